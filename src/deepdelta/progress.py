"""Progress for people: a live bar on a terminal, plain lines everywhere else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepdelta.errors import printable

PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines."""

PACE_SECONDS = 5.0
"""How long steps must have been made before their pace says when the last one will be."""


def show(line: str) -> None:
    """A line for people on the standard output."""
    print(printable(line), flush=True)


@runtime_checkable
class Reporter(Protocol):
    def update(self, done: int, facts: str) -> None:
        """Say that `done` steps are done, with some facts about the last one."""

    def note(self, text: str) -> None:
        """A line that stays."""


class _Bar:
    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self.progress = progress
        self.task = progress.add_task(label, total=total, completed=done, facts="")

    def update(self, done: int, facts: str) -> None:
        self.progress.update(self.task, completed=done, facts=facts)

    def note(self, text: str) -> None:
        self.progress.console.print(printable(text), markup=False, highlight=False)


class _Lines:
    def __init__(self, console: Console, label: str, total: int, done: int) -> None:
        self.console, self.label, self.total, self.first = console, label, total, done
        self.last = time.monotonic()
        self.said = done
        self.began: tuple[float, int] | None = None

    def update(self, done: int, facts: str) -> None:
        now = time.monotonic()
        if self.began is None and done > self.first:
            self.began = now, done
        if now - self.last >= PLAIN_INTERVAL or (done == self.total and done != self.said):
            self.last, self.said = now, done
            self.note("  ".join(filter(None, (f"{self.label} {done}/{self.total}", facts, self.left(done, now)))))

    def left(self, done: int, now: float) -> str:
        """By the pace since the first step was made, so without what came before it; nothing until there is one."""
        if self.began is None or now - self.began[0] < PACE_SECONDS or done == self.began[1]:
            return ""
        began, first = self.began
        return f"ETA {duration((now - began) / (done - first) * (self.total - done))}"

    def note(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


@contextmanager
def reporting(label: str, total: int, done: int = 0, console: Console | None = None) -> Iterator[Reporter]:
    """A reporter for `total` steps of which `done` are behind us."""
    console, label = console or Console(stderr=True), printable(label)
    if not console.is_terminal:
        yield _Lines(console, label, total, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress, label, total, done)

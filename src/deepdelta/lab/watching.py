"""The live view of runs and studies: what their files say, again and again. It reads, and never writes or locks."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent, wrap
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deepdelta.config import from_plain
from deepdelta.errors import UserError, printable
from deepdelta.files import HELD, AnyPath, read_object
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.experiments.work import WORK, Work
from deepdelta.progress import duration
from deepdelta.training import TrainConfig
from deepdelta.training.rundir import CONFIG, LOCK, METRICS

SECONDS = 1.0
"""Between two looks."""
ENDED = 20
"""Of the runs that ended, those that a terminal shows."""
TAIL = 1 << 16
"""Bytes of a run's metrics that are read: the pace is that of the steps in them."""
FRESH = 60.0
"""Where the system does not say who holds locks, a run is at work whose files are younger than so many seconds."""
NO_BREAK = "\u00a0"
LOCKS = Path("/proc/locks")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One run, as its files have it."""

    name: str
    state: str
    """waiting, running, stopped, finished or diverged."""
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    pace: float | None = None
    """Tokens per second."""
    left: float | None = None
    """Seconds to its last step, at this pace."""
    gate: float | None = None
    """The mean gate at the last validation."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "diverged")

    @property
    def share(self) -> float:
        """Of its steps, those made."""
        return self.step / self.steps if self.steps else 0.0

    @property
    def cells(self) -> tuple[str, ...]:
        of = "" if self.steps is None else f"/{self.steps:,}"
        return (
            printable(self.name),
            self.state + (f", {self.skipped} skipped" if self.skipped else ""),
            f"{self.step:,}{of}",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.validation_loss is None else f"{self.validation_loss:.4f}",
            "" if self.pace is None else f"{self.pace:,.0f}",
            "" if self.left is None else duration(self.left),
            "" if self.gate is None else f"{self.gate:.3f}",
        )

    @property
    def line(self) -> str:
        return "  ".join(f"{title} {cell}".strip() for title, cell in zip(WORDS, self.cells, strict=True) if cell)


class Study(NamedTuple):
    """A study or a task as a whole."""

    name: str
    ended: int
    runs: int
    """Those planned, where it is known, else those that were begun."""
    left: float | None
    """Seconds to the end of its last run, at the pace since it was begun or continued."""

    @property
    def line(self) -> str:
        eta = "" if self.left is None else f"  ETA {duration(self.left)}"
        return f"{printable(self.name)}  {self.ended} of {self.runs} runs ended{eta}"


class Look(NamedTuple):
    """All that a folder holds, at one moment."""

    runs: list[Seen]
    studies: list[Study]
    at_work: bool


TITLES = ("run", "state", "step", "loss", "validation", "tokens/s", "ETA", "gate")
WORDS = ("", "", *TITLES[2:])


def watch(path: AnyPath, console: Console | None = None) -> None:
    """Show a run, or those of a study or task, until none is at work: a table that changes; in a pipe, and in a
    terminal that cannot move its cursor, a line a change.

    Raises:
        UserError: there is neither a run nor a study; a file that is written whole is damaged.
    """
    path, console = Path(path), console or Console()
    if not console.is_terminal or console.is_dumb_terminal:
        said: dict[str, object] = {}
        for seen in _looks(path):
            runs = [(one.name, one, one.line) for one in seen.runs]
            studies = [(f"study {one.name}", one[:3], one.line) for one in seen.studies]
            for key, what, line in (*runs, *studies):
                if said.get(key) != what:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                said[key] = what
        return
    with Live(console=console, auto_refresh=False) as live:
        for seen in _looks(path):
            live.update(_view(seen, console.width), refresh=True)


def _looks(path: Path) -> Iterator[Look]:
    while True:
        yield (seen := look(path))
        if not seen.at_work:
            return
        time.sleep(SECONDS)


def _view(seen: Look, width: int) -> RenderableType:
    """What has not ended first, then the last that ended: the bottom is what a low terminal cuts. A table where it has
    room, else a paragraph a run."""
    ended = [one for one in seen.runs if one.ended]
    runs = [*(one for one in seen.runs if not one.ended), *reversed(ended[-ENDED:])]
    table = Table(*TITLES, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for one in runs:
        table.add_row(*map(Text, one.cells))
    studies = [Text(_folded(one.line, width), "bold") for one in seen.studies]
    if Console(width=10_000).measure(table).maximum <= width:
        return Group(*studies, table)
    return Group(*studies, *(Text(indent(_folded(one.line, width - 2), "  ")) for one in runs))


def _folded(line: str, width: int) -> str:
    """Broken between its parts, which two spaces hold apart, and not between a title and its number."""
    whole = re.sub("(?<! ) (?! )", NO_BREAK, line)
    return "\n".join(wrap(whole, width, break_on_hyphens=False)).replace(NO_BREAK, " ")


def look(path: Path) -> Look:
    """The runs that `path` holds, the studies they belong to, and whether any is at work.

    Raises:
        UserError: see `watch`.
    """
    if (path / CONFIG).exists() or (path / LOCK).exists():
        one = _run(path, path.name, _settings(path / CONFIG))
        return Look([one], [], one.state == "running")
    folders = [folder for folder in (path, *sorted(path.glob("*/"))) if _is_study(folder)]
    if not folders:
        raise UserError(
            f"{path} must be the folder of a run or of a study, but holds neither; give one, or wait for it."
        )
    runs, studies = list[Seen](), list[Study]()
    for folder in folders:
        prefix = "" if folder == path else f"{folder.name}/"
        own = _study(folder, prefix)
        runs += own
        # A study over sizes holds studies, and no runs of its own.
        if own or len(folders) == 1:
            studies.append(_whole(folder, str(path) if folder == path else folder.name, own, len(prefix)))
    return Look(runs, studies, any(map(_held, (folder / HELD for folder in folders))))


def _whole(folder: Path, name: str, runs: list[Seen], prefix: int) -> Study:
    ended = sum(one.ended for one in runs)
    if not (folder / WORK).exists() or not _held(folder / HELD):
        return Study(name, ended, len(runs), None)
    work = Work.read(folder / WORK)
    made = {one.name[prefix:]: 1.0 if one.ended else one.share for one in runs}
    return Study(name, ended, max(len(runs), len(work.amounts)), work.left(made, time.time()))


def _is_study(folder: Path) -> bool:
    return (folder / HELD).exists() or RecordFile(folder).path.exists()


def _study(folder: Path, prefix: str) -> list[Seen]:
    """Those with a record, in the order in which they ended; then those that were launched, which have a log."""
    records, runs = RecordFile(folder).rows(), folder / "runs"
    found = [_recorded(prefix, row) for row in records.values()]
    for name in sorted(file.stem for file in runs.glob("*.log") if file.stem not in records):
        if (runs / name).is_dir():
            found.append(_run(runs / name, prefix + name, _settings(runs / name / CONFIG)))
        else:  # a task's, which has no steps to look at, or one that is about to begin
            found.append(Seen(name=prefix + name, state="running" if _held(folder / HELD) else "stopped"))
    return found


def _recorded(prefix: str, row: dict[str, Any]) -> Seen:
    metrics, settings = row["metrics"], row["settings"]
    return Seen(
        name=prefix + row["name"],
        state="finished" if row["diverged"] is None else "diverged",
        step=int(metrics.get("steps") or settings.get("steps") or 0),
        steps=settings.get("steps"),
        validation_loss=metrics.get("validation_loss"),
    )


def _settings(file: Path) -> TrainConfig | None:
    """None where it is not written yet."""
    if not file.exists():
        return None
    return from_plain(TrainConfig, read_object(file, "restore it"), where=str(file))


def _run(path: Path, name: str, config: TrainConfig | None) -> Seen:
    rows = _tail(path / METRICS)
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    if not rows or config is None:
        return Seen(name=name, state="running" if _held(path / LOCK) else "waiting")
    steps = [row for row in rows if "loss" in row or "skipped" in row]
    step, pace = int(last["step"]), None
    if len(steps) > 1 and (spent := steps[-1]["seconds"] - steps[0]["seconds"]) > 0:
        pace = (steps[-1]["step"] - steps[0]["step"]) * config.tokens_per_step / spent
    state = "running" if _held(path / LOCK) else "stopped"
    if last.get("diverged"):
        state = "diverged"
    elif rows[-1].get("final") and step >= config.steps:
        state = "finished"
    left = (config.steps - step) * config.tokens_per_step / pace if pace and state == "running" else None
    return Seen(
        name=name,
        state=state,
        step=step,
        steps=config.steps,
        loss=last.get("loss"),
        validation_loss=last.get("validation_loss"),
        pace=pace,
        left=left,
        gate=last.get("gate_mean"),
        skipped=int(last.get("skipped", 0)),
    )


def _tail(file: Path) -> list[dict[str, Any]]:
    """The last whole lines that hold an object with a step; what is half-written or damaged is passed over."""
    try:
        with file.open("rb") as lines:
            start = max(0, lines.seek(0, 2) - TAIL)
            lines.seek(start)
            whole = lines.read().split(b"\n")[1 if start else 0 : -1]
    except FileNotFoundError:
        return []
    found = []
    for line in whole:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def _held(lock: Path) -> bool:
    """Whether a process holds the lock, as the system tells it: a try to lock it could refuse one that starts."""
    try:
        held, number = lock.stat(), str(lock.stat().st_ino)
    except FileNotFoundError:
        return False
    try:
        return any(line.split()[-3].endswith(f":{number}") for line in LOCKS.read_text().splitlines())
    except OSError:
        newest = max(held.st_mtime, *(file.stat().st_mtime for file in lock.parent.glob("*")))
        return time.time() - newest < FRESH

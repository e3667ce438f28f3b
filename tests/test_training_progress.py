"""Progress: plain lines where nobody watches, a live bar on a terminal."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepdelta import progress, train
from deepdelta.progress import duration, reporting
from deepdelta.training import trainer
from deepdelta.training.step import Made
from tiny_runs import config, text_file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_every_ten_seconds_and_at_the_end(clock: list[float]) -> None:
    out = io.StringIO()
    with reporting("run[a]", 100, done=20, console=Console(file=out, width=40)) as reporter:
        for step in range(21, 101):
            clock[0] += 0.5
            reporter.update(step, f"loss {step}")
            if step == 30:
                reporter.note("[bold]a note that is longer than the forty columns of the console")
        reporter.update(100, "loss 100")
    lines = out.getvalue().splitlines()
    assert lines[0] == "[bold]a note that is longer than the forty columns of the console"
    assert lines[1:] == [
        "run[a] 40/100  loss 40  ETA 0:30",
        "run[a] 60/100  loss 60  ETA 0:20",
        "run[a] 80/100  loss 80  ETA 0:10",
        "run[a] 100/100  loss 100  ETA 0:00",
    ]
    assert "\x1b" not in out.getvalue()


def test_the_time_left_follows_from_the_pace_alone_and_is_not_told_before_it_is_known(clock: list[float]) -> None:
    """What comes before the first step, half a minute here, is not counted as time of steps."""
    out = io.StringIO()
    with reporting("run", 820, done=20, console=Console(file=out)) as reporter:
        for done in (20, 20, 20, 21, *range(22, 62)):
            clock[0] += 10 if done == 20 else 1
            reporter.update(done, "")
    # From step 21 on one a second, so step 820 is 799 seconds after it.
    assert out.getvalue().splitlines() == [
        "run 20/820",
        "run 20/820",
        "run 20/820",
        "run 30/820  ETA 13:10",
        "run 40/820  ETA 13:00",
        "run 50/820  ETA 12:50",
        "run 60/820  ETA 12:40",
    ]


def test_a_live_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with reporting("my run", 10, done=4, console=Console(file=out, force_terminal=True, width=120)) as reporter:
        reporter.update(7, "loss 1.250  900 tokens/s")
        reporter.note("[bold] stays")
    shown = out.getvalue()
    assert "\x1b[" in shown
    for part in ("my run", "━", "7/10", "loss 1.250  900 tokens/s", "ETA", "[bold] stays"):
        assert part in shown, part


def test_what_training_shows_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=160)
    monkeypatch.setattr(progress, "Console", lambda **options: terminal)
    train(config(text_file(tmp_path / "t")), tmp_path / "run", say=lambda line: None)
    shown = out.getvalue()
    for part in ("20/20", "loss ", "tokens/s", "ETA", "step 8: validation loss ", "step 20: validation loss "):
        assert part in shown, part


def test_a_skipped_step_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress._Lines, "update", lambda self, done, facts: lines.append(facts))
    real, step = trainer.training_step, iter(range(20))

    def ruined(*arguments: Any, **options: Any) -> Made:
        made = real(*arguments, **options)
        return made._replace(norm=made.norm * math.nan) if next(step) in (3, 4) else made

    monkeypatch.setattr(trainer, "training_step", ruined)
    train(config(text_file(tmp_path / "t")), tmp_path / "run", say=lambda line: None)
    assert [number for number, line in enumerate(lines) if line.startswith("skipped  ")] == [3, 4]
    assert not any("nan" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"), (7384, "2:03:04")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(float(seconds)) == text

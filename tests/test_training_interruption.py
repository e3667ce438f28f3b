"""Killed, stopped or diverged: what is left is whole, and a run that continues makes the numbers it would have made."""

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdelta import UserError, load, train
from deepdelta.config import to_plain
from deepdelta.files import write_json
from deepdelta.training import Evaluation, RunDirectory, trainer
from deepdelta.training.trainer import stop_signals
from tiny_runs import assert_same_run, config, quietly, rows, start, tensors, text_file, wait_for_step

pytestmark = pytest.mark.usefixtures("unchecked_file")
STEPS = 200
LONG: dict[str, Any] = {"steps": STEPS, "eval_every": 90, "checkpoint_every": 50}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    quietly(config(source, **LONG), run)
    return run


@pytest.mark.parametrize(("checkpoint_every", "step", "beside"), [(50, 57, False), (1, 23, False), (1, 23, True)])
def test_kill_and_resume(
    source: Path, uninterrupted: Path, tmp_path: Path, checkpoint_every: int, step: int, beside: bool
) -> None:
    """SIGKILL in the midst of a step, or of a checkpoint where one is written after every step; what is written beside
    the steps may be lost too, with those up to the next one, which waits for it."""
    changes = {"checkpoint_every": checkpoint_every, "async_save": beside}
    settings, run = config(source, **LONG | changes), tmp_path / "run"
    write_json(tmp_path / "config.json", to_plain(settings))
    with start("train", run, "--config", tmp_path / "config.json", cwd=tmp_path) as process:
        wait_for_step(run, step, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    saved, recorded = RunDirectory(run).step(), RunDirectory(run).last_recorded_step()
    assert saved % checkpoint_every == 0 and saved <= recorded < STEPS
    assert recorded <= saved + checkpoint_every * (2 if beside else 1)
    lines: list[str] = []
    train(config(source, **LONG), run, say=lines.append)
    assert f"Continuing {run} at step {saved} of {STEPS}." in lines
    assert_same_run(run, uninterrupted)
    # Nor does anything of the killed writer stay.
    assert {path.name for path in run.iterdir()} == {path.name for path in uninterrupted.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_and_resume(source: Path, uninterrupted: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    write_json(tmp_path / "config.json", to_plain(config(source, **LONG)))
    with start("train", run, "--config", tmp_path / "config.json", cwd=tmp_path) as process:
        wait_for_step(run, 31, process)
        process.send_signal(number)
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    step = RunDirectory(run).step()
    assert 31 <= step < STEPS and step == RunDirectory(run).last_recorded_step()
    assert f"Stopped at step {step} of {STEPS}, saved. The same command continues." in printed
    quietly(config(source, **LONG), run)
    assert_same_run(run, uninterrupted)


def test_a_second_signal_interrupts_and_the_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(KeyboardInterrupt), stop_signals() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_during_the_last_step_finishes_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = trainer.append_json

    def append_and_signal(file: Path, row: dict[str, Any]) -> None:
        recorded(file, row)
        if row["step"] == 20 and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "append_json", append_and_signal)
    result = quietly(config(source), tmp_path / "run")
    assert result.finished and result.validation_loss == rows(tmp_path / "run")[-1]["validation_loss"]


def diverges(message: str, run: Path, settings: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        quietly(settings, run)
    assert "training diverged. The last good checkpoint is at step" in str(caught.value)
    assert f"Lower lr (now {settings.lr:g}) or clip, or lengthen warmup." in str(caught.value)
    assert rows(run)[-1]["diverged"] is True
    assert all(math.isfinite(row["loss"]) for row in rows(run) if "loss" in row)


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_a_rate_far_too_high_stops_with_the_last_good_checkpoint(
    source: Path, tmp_path: Path, checkpoint_every: int
) -> None:
    """The first update ruins the weights, which the second step's loss shows: they must not become a checkpoint."""
    run = tmp_path / "run"
    settings = config(source, lr=1e30, warmup=0, clip=1e9, checkpoint_every=checkpoint_every)
    message = "the loss is (nan|inf).* at step 4, 3 such steps in a row .*'stream.expansion'.*: .* at step 0 in "
    diverges(message, run, settings)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4] and RunDirectory(run).step() == 0
    quietly(config(source, steps=1), tmp_path / "other")  # the same start
    first = rows(tmp_path / "other")[0]["loss"]
    assert rows(run)[0]["loss"] == first
    assert all(tensor.isfinite().all() for tensor in tensors(run).values())
    load(run)
    diverges("at step 4", run, settings)  # continued, it comes to the same end
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


def test_gradients_that_are_not_finite_stop_before_the_update(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = trainer.nn.utils.clip_grad_norm_, []

    def clip(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(original(*arguments, **options))
        return torch.tensor(math.inf) if 10 <= len(calls) <= 12 else calls[-1]

    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", clip)
    message = "gradient norm inf at step 12, 3 .*every layer's output is finite.* checkpoint is at step 7 in "
    diverges(message, tmp_path / "run", config(source))
    assert RunDirectory(tmp_path / "run").step() == 7
    monkeypatch.undo()
    quietly(config(source), tmp_path / "run")  # continued from the good checkpoint, as if nothing had been
    quietly(config(source), tmp_path / "other")
    assert_same_run(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize(("step", "good"), [(8, 7), (20, 20)])
def test_a_validation_loss_that_is_not_finite(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, good: int
) -> None:
    original = trainer.evaluate

    def evaluate(*arguments: Any, tokens: int | None, **options: Any) -> Evaluation:
        made = original(*arguments, tokens=tokens, **options)
        return made if (tokens is None) != (step == 20) else Evaluation(math.nan, made.tokens, made.how)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    diverges(f"the validation loss is nan after step {step}: .* at step {good} in", tmp_path / "run", config(source))
    assert RunDirectory(tmp_path / "run").step() == good


def test_the_lock_of_a_killed_run_is_free(uninterrupted: Path, tmp_path: Path) -> None:
    """The lock belongs to the process, not to the file: a copy of a run that a crash left behind is not busy."""
    copy = Path(shutil.copytree(uninterrupted, tmp_path / "copy"))
    assert (copy / ".lock").exists() and not RunDirectory(copy).busy

"""`deepdelta train --track`, and the examples of docs/ecosystem.md with lightning and accelerate."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepdelta.cli import main
from tiny_runs import rows, text_file

pytestmark = pytest.mark.usefixtures("unchecked")
PAGE = Path(__file__).parents[1] / "docs" / "ecosystem.md"
SIZES = ("--model.dim", "16", "--model.layers", "1", "--model.heads", "2", "--model.context", "16", "--lr", "0.01")
SHORT = ("--warmup", "2", "--batch-size", "2", "--device", "cpu", "--threads", "1", "--schedule", "constant")


def train(run: Path, source: Path, steps: int, *more: str) -> None:
    main(["train", str(run), "--data.source", str(source), *SIZES, *SHORT, "--steps", str(steps), *more])


@pytest.mark.home
@pytest.mark.compatible("deepdelta train --track tensorboard: the rows of metrics.jsonl", "tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_row_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, source = tmp_path / "run", text_file(tmp_path / "text.txt")
    train(run, source, 6, "--track", "tensorboard")
    train(run, source, 9, "--track", "tensorboard")
    held = EventAccumulator(str(run / "tensorboard"))
    held.Reload()
    made = [row for row in rows(run) if "loss" in row]
    for name in ("loss", "gradient_norm", "lr"):
        told = [(event.step, event.value) for event in held.Scalars(name)]
        assert [step for step, _ in told] == list(range(1, 10))
        assert [value for _, value in told] == pytest.approx([row[name] for row in made], rel=1e-6)
    validated = {event.step: event.value for event in held.Scalars("validation_loss")}
    assert validated == pytest.approx({row["step"]: row["validation_loss"] for row in rows(run) if "final" in row})


@pytest.mark.home
@pytest.mark.compatible("deepdelta train --track wandb, offline", "wandb")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_weights_and_biases_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "own"))
    run = tmp_path / "run"
    train(run, text_file(tmp_path / "text.txt"), 4, "--track", "wandb")
    wandb.teardown()  # the service that writes the file, which a command's process waits for at its end
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    held = list(records(file))
    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in one.history.item}
        for one in held
        if one.HasField("history")
    ]
    made = [row for row in rows(run) if "loss" in row]
    logged = {row["_step"]: row["gradient_norm"] for row in history if "gradient_norm" in row}
    assert logged == pytest.approx({row["step"]: row["gradient_norm"] for row in made})


def records(file: Path) -> Iterator[Any]:
    """What wandb keeps of a run that is offline, in a file below 32 KiB: a head, then records behind 7 bytes each."""
    from wandb.proto import wandb_internal_pb2

    held, place = file.read_bytes(), 7
    assert held[:4] == b":W&B" and len(held) < 1 << 15
    while place < len(held):
        first = place + 7
        place = first + int.from_bytes(held[place + 4 : place + 6], "little")
        record = wandb_internal_pb2.Record()
        record.ParseFromString(held[first:place])
        yield record


def test_nothing_is_tracked_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = text_file(tmp_path / "text.txt")
    train(tmp_path / "run", source, 3)
    assert not {"tensorboard", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "other", source, 3, "--track", "tensorboard")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and not (tmp_path / "other").exists()
    assert "need the extra 'track'" in said and 'pip install "deep-delta-learning[track]"' in said


def example(package: str) -> str:
    """The code block of the page that imports this package."""
    (found,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
        if f"import {package}" in block
    ]  # fmt: skip
    return found


@pytest.mark.compatible("the example with accelerate", "accelerate")
def test_the_example_with_accelerate(capsys: pytest.CaptureFixture[str]) -> None:
    exec(example("accelerate"), {"__name__": "example"})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5


@pytest.mark.home
@pytest.mark.compatible("the example with lightning", "lightning")
@pytest.mark.filterwarnings("ignore::Warning")
def test_the_example_with_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    held: dict[str, object] = {"__name__": "example"}
    exec(example("lightning"), held)
    trainer = held["trainer"]
    assert trainer.global_step == 20 and trainer.callback_metrics["loss"] < 2.3  # type: ignore[attr-defined]

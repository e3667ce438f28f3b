"""Studies whose runs go on from a trained one: once per seed, from exactly its weights, and never from another."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepdelta import UserError, load, progress
from deepdelta.config import from_plain
from deepdelta.data import batch, load_corpus, train_tail
from deepdelta.lab import runner
from deepdelta.lab.analysis.results import StudyResults, load_results
from deepdelta.lab.experiments.config import START_SEED, StudyConfig
from deepdelta.lab.experiments.places import Places
from deepdelta.lab.experiments.plan import Plan
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import FILE_NAME, RecordFile
from deepdelta.lab.experiments.training_run import TrainingRun, canonical
from deepdelta.lab.runner import run_study
from deepdelta.lab.views.study import main_table
from deepdelta.training import RunDirectory, TrainConfig
from tiny_runs import (
    RUNS,
    assert_same_run,
    forget,
    nats,
    quietly,
    recorded,
    rows,
    study_from,
    trained_here,
    without_curves,
)

pytestmark = pytest.mark.usefixtures("unchecked_file")
STUDY = """
name = "tiny"
question = "Does it go on?"
baseline = "plain"
seeds = [0, 1]
rewrite_tokens = 64
[start]
steps = 10
lr = 1e-2
[train]
steps = 6
warmup = 2
eval_every = 4
eval_tokens = 64
final_eval_tokens = 200
checkpoint_every = 100
RUNS
[conditions.plain]
summary = "x + h"
changes.model.residual = { rule = "additive", value_channels = 1, expansion = "repeat" }
[conditions.retrofit]
summary = "V = 4"
changes.model.residual = { rule = "additive_erase", plain_start = true, gate_per_channel = true, expansion = "repeat" }
""".replace("RUNS\n", RUNS)
STARTS = {f"plain+start-seed{seed + START_SEED}" for seed in (0, 1)}
OTHERS = {f"{name}-seed{seed}" for name in ("plain", "retrofit") for seed in (0, 1)}

Done = tuple[StudyConfig, Path, StudyResults]


study = partial(study_from, STUDY)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(runner, "measure", lambda *_: {})
    return trained_here(monkeypatch)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResults, list[str]]:
    """A finished study's folder, its results and the runs that were made, in order."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "measure", lambda *_: {})
        names = trained_here(monkeypatch)
        results = run_study(study(folder), folder / "out", places=Places(workers=2), command="deepdelta study")
    return folder, results, names


@pytest.fixture
def done(original: tuple[Path, StudyResults, list[str]], tmp_path: Path) -> Done:
    """The study, a copy of its folder, and its results."""
    shutil.copytree(original[0] / "out", tmp_path / "out")
    return study(tmp_path, source=original[0] / "text.txt"), tmp_path / "out", original[1]


def again(config: StudyConfig, out: Path) -> StudyResults:
    return run_study(config, out, places=Places(workers=2), command="")


def drop(out: Path, name: str, *, record: bool = True) -> None:
    """As if the run had never been made, but for its record."""
    shutil.rmtree(out / "runs" / name)
    (out / "runs" / f"{name}.json").unlink()
    if record:
        forget(out, name)


def planned(config: StudyConfig, out: Path, name: str) -> TrainingRun:
    corpus = load_corpus(config.train_config("plain", 0).data)
    plan = Plan(config, corpus, train_tail(corpus), RecordFile(out))
    return next(run for run in plan.runs(config, {}).values() if run.name == name)


# What a run starts from


def test_one_start_per_seed_before_its_runs(original: tuple[Path, StudyResults, list[str]]) -> None:
    folder, results, names = original
    assert set(names) == STARTS | OTHERS and len(names) == len(STARTS | OTHERS)
    assert set(recorded(folder / "out")) == STARTS | OTHERS
    for seed in (0, 1):
        first = names.index(f"plain+start-seed{seed + START_SEED}")
        assert all(names.index(name) > first for name in OTHERS if name.endswith(f"seed{seed}"))
    assert results.budget.start_steps == 10 and load_results(folder / "out" / "results.json") == without_curves(results)
    assert any("go on from the weights of one run of 10 steps" in note for note in main_table(results).notes)


def test_a_run_goes_on_from_exactly_the_weights_of_its_start(done: Done, tmp_path: Path) -> None:
    """The same as the two runs by hand; and its first loss is what the start's weights give on its first batch."""
    config, out, _ = done
    began = from_plain(
        TrainConfig,
        json.loads((out / "runs" / "plain-seed1.json").read_text())
        | {"steps": 10, "lr": 1e-2, "warmup": 2, "seed": 1 + START_SEED},
    )
    quietly(began, tmp_path / "began")
    assert_same_run(out / "runs" / f"plain+start-seed{1 + START_SEED}", tmp_path / "began")
    model = load(tmp_path / "began").model
    train = np.asarray(load_corpus(began.data).train)
    for name in ("plain", "retrofit"):
        quietly(config.train_config(name, 1), tmp_path / name, init_from=tmp_path / "began")
        assert_same_run(out / "runs" / f"{name}-seed1", tmp_path / name)
        ids, labels = batch(train, seed=1, step=0, batch_size=2, context=16)
        windows = torch.cat((ids, labels[:, -1:]), dim=1).numpy()
        expected = np.mean([nats(model, window) for window in windows])
        assert rows(tmp_path / name)[0]["loss"] == pytest.approx(expected, abs=2e-6)
    assert rows(tmp_path / "plain")[3]["loss"] != rows(tmp_path / "retrofit")[3]["loss"]
    # Another batch than the start's first, and a lower loss than at its beginning.
    assert rows(tmp_path / "plain")[0]["loss"] < rows(tmp_path / "began")[0]["loss"] - 0.2


def test_records_hold_the_start(done: Done, tmp_path: Path) -> None:
    config, out, _ = done
    records = {name: from_plain(RunRecord, row) for name, row in recorded(out).items()}
    for name in OTHERS:
        record = records[name]
        start = records[f"plain+start-seed{record.seed + START_SEED}"]
        assert record.inputs["start"] == start.settings and start.inputs["start"] is None, name
        assert (start.condition, start.seed, start.metrics["steps"]) == ("plain", record.seed + START_SEED, 10)
    settings = config.train_config("plain", 0)
    start = config.start_config(0)
    assert canonical(start)["lr"] == 1e-2 and canonical(start)["model"] == canonical(settings)["model"]


# What is not run again, and what is


def test_with_its_records_alone_nothing_runs(done: Done, launched: list[str], tmp_path: Path) -> None:
    config, out, results = done
    assert again(config, out).conditions == results.conditions
    shutil.rmtree(out / "runs")
    assert again(config, out).conditions == results.conditions
    forget(out, *STARTS)  # what nobody needs
    assert again(config, out).conditions == results.conditions and not launched


def test_a_start_that_is_there_is_used_and_one_that_is_gone_is_trained_again(done: Done, launched: list[str]) -> None:
    config, out, results = done
    one, name = f"plain+start-seed{START_SEED}", "retrofit-seed0"
    before = recorded(out)[one]
    drop(out, name)
    assert again(config, out).conditions[0] == results.conditions[0]
    assert launched == [name]
    drop(out, name)
    drop(out, one, record=False)
    launched.clear()
    losses = again(config, out).condition("retrofit").losses()
    assert launched == [one, name] and losses == results.condition("retrofit").losses()
    assert recorded(out)[one] == before
    # Its weights alone are gone; the other seed's are not needed.
    for seed in (0, 1):
        (out / "runs" / f"plain+start-seed{seed + START_SEED}" / "checkpoint.safetensors").unlink()
    drop(out, name)
    launched.clear()
    losses = again(config, out).condition("retrofit").losses()
    assert launched == [one, name] and losses == results.condition("retrofit").losses()


def test_starts_keep_their_weights_until_all_have_gone_on(tmp_path: Path, launched: list[str]) -> None:
    config = study(tmp_path, ('"Does it go on?"', '"?"\nkeep_checkpoints = false'), ("[0, 1]", "[0]"))
    results = again(config, tmp_path / "out")
    assert results.condition("retrofit").losses() and not list(tmp_path.rglob("checkpoint.safetensors"))
    launched.clear()
    assert again(config, tmp_path / "out").conditions == results.conditions and not launched


def test_an_interrupted_run_needs_its_start_no_more(
    done: Done, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, results = done
    one, run = f"plain+start-seed{START_SEED}", planned(config, out, "retrofit-seed0")
    drop(out, run.name)

    def interrupt(self: Any, done: int, text: str) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(progress._Lines, "update", interrupt)
        quietly(run.settings, run.path, init_from=out / "runs" / one)
    assert RunDirectory(run.path).step() == 3
    drop(out, one, record=False)
    assert again(config, out).condition("retrofit").losses() == results.condition("retrofit").losses()
    assert launched == [run.name]


# Refused


def test_another_start_is_refused(done: Done, launched: list[str], tmp_path: Path) -> None:
    config, out, _ = done
    source = Path(config.train["data"]["source"])
    other = study(tmp_path, ("steps = 10", "steps = 11"), source=source)
    with pytest.raises(UserError, match=r"settings of plain \(steps: 10 there, 11 here\).*start-seed1000; give"):
        again(other, out)
    for name in STARTS:
        drop(out, name)
    with pytest.raises(UserError, match=r"settings of plain \(start.steps: 10 there, 11 here\) in plain-seed0;"):
        again(other, out)
    with pytest.raises(UserError, match=r"settings of plain \(start: \{.* there, None here\)"):
        again(study(tmp_path, ("[start]\nsteps = 10\nlr = 1e-2\n", ""), source=source), out)
    (out / FILE_NAME).unlink()  # runs in progress too remember what they began with
    with pytest.raises(UserError, match=r"settings of plain \(start.steps: 10 there, 11 here\) in .*runs/plain-seed0;"):
        again(other, out)
    assert not launched


def test_a_start_that_diverged(tmp_path: Path, launched: list[str]) -> None:
    config = study(tmp_path, ("lr = 1e-2", "lr = 1e30\nwarmup = 0"), ("[0, 1]", "[0]"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"start-seed1000 diverged, and no run can start from it: lower lr"):
            again(config, tmp_path / "out")
    assert launched == [f"plain+start-seed{START_SEED}"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 1e-2", "seed = 3", "the seed of a start comes from the study's seeds; remove 'seed' from start"),
        ("lr = 1e-2", "device = 'cpu'", "the start must share 'device' with the runs that go on from it: move it to"),
        ("lr = 1e-2", "lrr = 1e-2", "study tiny, start: unknown key 'lrr'; did you mean 'lr'"),
        (
            "[train]",
            "[train]\ninit_offset = 9",
            "runs that go on from a start have its weights: remove init_offset from '",
        ),
        ("lr = 1e-2", "warmup = -1", "study tiny, start: warmup must lie in"),
        ("[train]", "[tune]\nlr = [1e-3, 1e-2]\nseeds = [7]\n[train]", "runs that are tuned, .* have no start: remove"),
    ],
)
def test_starts_that_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(tmp_path, (old, new))

"""Tiny runs that several test files start: a small text, a small model, processes of their own."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deepdelta.cli.runs
from deepdelta import GPT, UserError
from deepdelta.cli import main
from deepdelta.config import from_plain, merged
from deepdelta.lab.analysis.results import RunResult, StudyResults
from deepdelta.lab.experiments import pool
from deepdelta.lab.experiments.config import StudyConfig, load_study
from deepdelta.lab.experiments.records import FILE_NAME, RecordFile
from deepdelta.lab.experiments.run import Run
from deepdelta.training import RunDirectory, TrainConfig, train
from deepdelta.training.parts import Stored
from deepdelta.training.trainer import Trained

WORDS = "def return import class self for while if else the of and state gate write erase €".split()
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
    "PYTHONPATH": str(Path(deepdelta.__file__).resolve().parents[1]),
}
MODEL = {"context": 16, "layers": 1, "heads": 2, "dim": 16, "embedding_std": 0.02}
RUNS = """
batch_size = 2
device = "cpu"
threads = 1
backend = "reference"
data = { source = "SOURCE" }
lr = 2e-3
model = { context = 16, layers = 1, heads = 2, dim = 16, embedding_std = 0.02 }
"""
"""What the runs of a tiny study share, as lines of its table [train]; SOURCE is to be replaced by a text file."""


def text_file(path: Path, words: int = 640) -> Path:
    """A text of a few kilobytes, always the same."""
    draw = random.Random(1)
    path.write_text("".join(draw.choice(WORDS) + (" " if i % 8 else "\n") for i in range(words)), encoding="utf-8")
    return path


def study_from(text: str, folder: Path, *replacements: tuple[str, str], source: Path | None = None) -> StudyConfig:
    """The study of a file of this text, with replacements, each of what stands in it once."""
    text = text.replace("SOURCE", str(source or text_file(folder / "text.txt")))
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "study.toml").write_text(text)
    return load_study(str(folder / "study.toml"))


def settings(source: Path, **changes: Any) -> dict[str, Any]:
    """A run of 20 steps as plain data, with `changes` laid over it."""
    plain: dict[str, Any] = {
        "model": MODEL,
        "data": {"source": str(source)},
        "steps": 20,
        "batch_size": 2,
        "lr": 2e-3,
        "warmup": 3,
        "eval_every": 8,
        "eval_tokens": 64,
        "checkpoint_every": 7,
        "device": "cpu",
        "threads": 1,
    }
    return merged(plain, changes)


def config(source: Path, **changes: Any) -> TrainConfig:
    return from_plain(TrainConfig, settings(source, **changes))


def quietly(settings: TrainConfig, run: Path, **options: Any) -> Trained:
    return train(settings, run, say=lambda line: None, **options)


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> TrainConfig:
    """The settings with which `deepdelta train` would train, typed so."""
    given: list[TrainConfig] = []

    def note(config: TrainConfig, run: Path, **options: Any) -> Trained:
        given.append(config)
        return Trained(0, False, None)

    monkeypatch.setattr(deepdelta.cli.runs, "train", note)
    main(["train", "unused", *map(str, arguments)])
    return given[0]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "deepdelta", *map(str, arguments)]


def start(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, both of its outputs in one pipe."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Ended(subprocess.Popen[bytes]):
    """In place of a process of the pool: it has ended already."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.stdin = code, None

    def wait(self, timeout: float | None = None) -> int:
        return self.code

    def terminate(self) -> None:
        pass


def trained_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs of studies that are started from now on: the same commands, but in this process and at once."""
    names: list[str] = []

    def launch(run: Run, device: str | None = None) -> Ended:
        module, train, path, *command = run.command()
        names.append(run.name)
        given = dict(zip(command[::2], command[1::2], strict=True))
        assert (module, train, path) == ("deepdelta", "train", str(run.path))
        settings = from_plain(TrainConfig, json.loads(Path(given.pop("--config")).read_text()))
        with contextlib.suppress(UserError):  # as of a process: what is left of it is in its directory
            quietly(settings, run.path, init_from=Path(given.pop("--init-from")) if given else None)
        assert not given
        return Ended()

    monkeypatch.setattr(pool, "launch", launch)
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.0)
    return names


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Return as soon as the run has recorded `step`; the process must still be at work then."""
    while RunDirectory(run).last_recorded_step() < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def rows(run: Path) -> list[dict[str, Any]]:
    """The recorded lines without what the clock decides."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def tensors(run: Path) -> dict[str, Tensor]:
    """Weights and optimiser state of the checkpoint, whole."""
    stored = Stored(run / "checkpoint.safetensors")
    return {name: stored.whole(name) for name in stored.pieces}


def assert_same_run(one: Path, other: Path) -> None:
    """Every recorded number, every weight and the optimiser's state are the same bit for bit."""
    for row, expected in zip(rows(one), rows(other), strict=True):
        assert row == expected, f"{row} instead of {expected}"
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    differing = [name for name in a if not a[name].equal(b[name])]
    assert not differing, differing


def nats(model: GPT, ids: np.ndarray) -> list[float]:
    """-log p of every id but the first, window by window, the softmax written out in fp64."""
    context, found = model.config.context, []
    for start in range(0, len(ids) - 1, context):
        window = torch.from_numpy(ids[start : start + context + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        shifted = logits - logits.max(1, keepdim=True).values
        log_probabilities = shifted - shifted.exp().sum(1, keepdim=True).log()
        found += [-log_probabilities[i, label].item() for i, label in enumerate(window[1:].tolist())]
    return found


def recorded(out: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder, by name, as plain data."""
    return RecordFile(out).rows()


def record_anew(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Have a folder hold these records and no others."""
    (out / FILE_NAME).unlink(missing_ok=True)
    file = RecordFile(out)
    for row in rows.values():
        file.append(row)


def forget(out: Path, *names: str) -> None:
    """Take records out of a folder."""
    rows = recorded(out)
    for name in names:
        del rows[name]
    record_anew(out, rows)


def without_curves(results: StudyResults) -> StudyResults:
    """As results.json holds them; curves are in the records."""

    def bare(runs: tuple[RunResult, ...]) -> tuple[RunResult, ...]:
        return tuple(replace(run, curve=()) for run in runs)

    conditions = (
        replace(one, runs=bare(one.runs), matched={budget: bare(runs) for budget, runs in one.matched.items()})
        for one in results.conditions
    )
    return replace(results, conditions=tuple(conditions))

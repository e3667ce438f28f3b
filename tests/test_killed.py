"""SIGKILL at seeded points of a run, of a study, of its runs and of both: the same command ends in the same bits."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deepdelta.config import from_plain
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.training import RunDirectory
from tiny_runs import ENVIRONMENT, assert_same_run, recorded, settings, start, study_from, text_file, wait_for_step

STUDY = """
name = "tiny"
question = "Does it go on?"
baseline = "additive"
seeds = [0, 1]
cost_rounds = 1
rewrite_tokens = 70
[train]
steps = 120
lr = 2e-3
batch_size = 2
warmup = 3
eval_every = 50
eval_tokens = 64
final_eval_tokens = 200
checkpoint_every = 40
device = "cpu"
threads = 1
data = { source = "SOURCE" }
model = { context = 16, layers = 1, heads = 2, dim = 16 }
[conditions.additive]
summary = "x + F(x)"
changes.model.residual.preset = "additive"
"""
ENDS_WITHIN = 60.0
"""Seconds that runs have to end in once their study was killed: ten of grace and what a busy machine adds."""


def killed_at_points(folder: Path, seed: int, points: int, *, by_clock: bool) -> list[list[Any]]:
    """What went on at each point, where, and which files then differ from the uninterrupted run's."""
    plain = settings(
        text_file(folder / "text.txt"),
        **{"steps": 6, "eval_every": 3, "checkpoint_every": 2, "keep_last": 2, "keep_best": True, "average": "ema"},
    )
    job = {"folder": str(folder), "seed": seed, "points": points, "by_clock": by_clock, "settings": plain}
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), str(folder / "job.json")]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)["points"]


def test_a_run_killed_at_seeded_points_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Weights, optimiser, averages and metrics; a point in each of its phases, drawn from the calls made there."""
    points = killed_at_points(tmp_path, seed=3, points=5, by_clock=False)
    assert {phase for phase, *_ in points} == {"start", "steps", "checkpoint", "evaluation", "between"}
    assert [different for *_, different in points] == [[]] * 5


def study(folder: Path) -> Path:
    study_from(STUDY, folder)
    return folder / "study.toml"


def finish_study(folder: Path, out: Path) -> None:
    with start("study", folder / "study.toml", "--out", out, "--workers", "2", cwd=folder) as process:
        printed = process.communicate()[0]
    assert process.returncode == 0, printed


def kill_in_study(folder: Path, out: Path, who: str, draw: random.Random, steps: range = range(1, 100)) -> None:
    """Start a study in `out`, kill its process, one of its runs, or all of them, and wait until none is left.

    Args:
        steps: of one run; at one of them, drawn, it happens.
    """
    run = out / "runs" / f"additive-seed{draw.randrange(2)}"
    with start("study", folder / "study.toml", "--out", out, "--workers", "2", cwd=folder) as process:
        wait_for_step(run, draw.choice(steps), process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        # The run whose step is known: the other may be at its end.
        own = [child for child in children if str(run) in " ".join(child.cmdline())] if who == "run" else []
        assert who != "run" or own
        victims = {"study": [], "run": own, "both": children}[who]
        if who != "run":
            process.kill()
        for child in victims:
            child.kill()
        printed = process.communicate()[0]
    assert process.returncode == (2 if who == "run" else -signal.SIGKILL), printed
    assert who != "run" or "was ended by SIGKILL; the same command continues" in printed
    began = time.monotonic()
    gone, alive = psutil.wait_procs(children, ENDS_WITHIN)
    assert not alive and len(gone) == len(children), f"after {time.monotonic() - began:.0f} s there is still {alive}"


def assert_same_study(one: Path, other: Path) -> None:
    assert recorded(one).keys() == recorded(other).keys() != set()
    for name, row in recorded(one).items():
        assert_same_run(one / "runs" / name, other / "runs" / name)
        here, there = (from_plain(RunRecord, rows[name]) for rows in ({name: row}, recorded(other)))
        assert here.metrics == there.metrics and here.rewrites == there.rewrites and here.sample == there.sample


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    study(folder)
    finish_study(folder, folder / "out")
    return folder


@pytest.mark.scale
@pytest.mark.parametrize("kills", [("study", "run"), ("both",)], ids=str)
def test_a_study_killed_with_or_without_its_runs_ends_in_the_same_bits(
    whole: Path, tmp_path: Path, kills: tuple[str, ...]
) -> None:
    """And no run keeps a core when its study is dead; the short form is in tests/test_study_runs.py."""
    out = tmp_path / "out"
    for who, steps in zip(kills, (range(1, 40), range(60, 100)), strict=False):
        kill_in_study(whole, out, who, random.Random(who), steps)
    assert not any(RunDirectory(run).busy for run in (out / "runs").iterdir() if run.is_dir())
    finish_study(whole, out)
    assert_same_study(out, whole / "out")
    shutil.rmtree(out)

"""Studies on a Ray cluster of this machine; `make test-scale`."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from deepdelta.lab.experiments.config import load_study
from test_killed import STUDY
from tiny_runs import assert_same_run, quietly, recorded, start, study_from, wait_for_step

pytestmark = pytest.mark.scale


def worker_of(process: int, run: str) -> psutil.Process:
    """The worker of Ray that holds the process of a run: its parent."""
    for child in psutil.Process(process).children(recursive=True):
        if any(word.endswith(f"/runs/{run}") for word in child.cmdline()) and "deepdelta" in child.cmdline():
            return child.parent()
    raise AssertionError(f"no process makes {run}")


@pytest.mark.parametrize("kills", [0, 1])
def test_a_study_on_a_cluster_loses_nothing_with_a_worker_and_makes_nothing_twice(tmp_path: Path, kills: int) -> None:
    study_from(STUDY.replace("steps = 120", "steps = 400"), tmp_path)
    out, words = tmp_path / "out", ("study", tmp_path / "study.toml", "--on", "ray", "--workers", "2")
    with start(*words, "--out", out, cwd=tmp_path) as process:
        if kills:
            run = out / "runs" / "additive-seed1"
            wait_for_step(run, 60, process)
            os.kill(worker_of(process.pid, run.name).pid, signal.SIGKILL)
        children = psutil.Process(process.pid).children(recursive=True)
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    _, alive = psutil.wait_procs(children, 30)
    assert not alive
    config = load_study(str(tmp_path / "study.toml"))
    assert len(recorded(out)) == 2
    for seed in (0, 1):
        run, begun = out / "runs" / f"additive-seed{seed}", 1 + (kills and seed == 1)
        log = run.with_name(f"{run.name}.log").read_text()
        assert log.count("Device cpu") == begun and log.count(f"Continuing {run} at step ") == begun - 1
        quietly(config.train_config("additive", seed), tmp_path / f"alone{seed}")
        assert_same_run(run, tmp_path / f"alone{seed}")


def test_a_study_on_a_cluster_that_is_stopped_saves_its_steps(tmp_path: Path) -> None:
    study_from(STUDY.replace("steps = 120", "steps = 100000"), tmp_path)
    run = tmp_path / "out" / "runs" / "additive-seed0"
    words = ("study", tmp_path / "study.toml", "--on", "ray", "--workers", "2", "--out", tmp_path / "out")
    with start(*words, cwd=tmp_path) as process:
        wait_for_step(run, 5, process)
        began = time.monotonic()
        process.terminate()
        printed = process.communicate()[0]
    assert process.returncode == 130 and "Every run has saved its step" in printed, printed
    assert "Stopped at step" in run.with_name("additive-seed0.log").read_text() and time.monotonic() - began < 60

"""The pool of processes: order, how many at a time, failures, an end from outside; and locks of folders for results."""

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepdelta import UserError, errors
from deepdelta.files import HELD, locked
from deepdelta.lab.experiments import places as places_module
from deepdelta.lab.experiments import pool
from deepdelta.lab.experiments.places import Places
from deepdelta.lab.experiments.pool import Claimed, Runner, run_processes
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.experiments.run import Run
from tiny_runs import ENVIRONMENT

WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[1])"
SLEEPS = "import sys, time; print('at work', flush=True); time.sleep(1000)"
FAILS = "print('first'); raise SystemExit('the last line')"


TWO = Places(workers=2)


class Made(Run):
    """A run whose process writes a file."""

    refusal = interrupted = ""
    share = 0.0

    def __init__(self, folder: Path, name: str, code: str = WRITES, after: str | None = None) -> None:
        own = {"name": name, "code": code, "after": after, "records": RecordFile(folder)}
        for key, value in own.items():
            object.__setattr__(self, key, value)

    @property
    def path(self) -> Path:
        return self.records.path.with_name(self.name)

    @property
    def log(self) -> Path:
        return self.records.path.with_name(f"{self.name}.log")

    @property
    def ended(self) -> bool:
        return self.path.exists()

    def waits(self, unfinished: Any) -> bool:
        return self.after in unfinished

    def command(self) -> list[str]:
        return [self.code, str(self.path)]

    def make_record(self) -> RunRecord:
        raise NotImplementedError

    def differences(self, record: RunRecord) -> list[str]:
        raise NotImplementedError


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started, of Python alone, which starts fast."""
    started: list[subprocess.Popen[bytes]] = []

    def launch(run: Made, device: str | None) -> subprocess.Popen[bytes]:
        with run.log.open("ab") as log:
            command = [sys.executable, "-c", *run.command()]
            environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment))
        return started[-1]

    monkeypatch.setattr(pool, "launch", launch)
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.01)
    return started


def run(
    runs: list[Made],
    places: Places = TWO,
    stopped: Callable[[], bool] = lambda: False,
    **options: Any,
) -> dict[str, str]:
    """What the runs wrote, by name, in the order in which they ended."""
    found: dict[str, str] = {}
    options = {"watch": lambda waiting, running: None} | options
    run_processes(
        runs, lambda one: found.update({one.name: one.path.read_text()}), places=places, stopped=stopped, **options
    )
    return found


def test_every_record_is_made_once_and_no_more_than_so_many_at_a_time(tmp_path, processes):
    seen: list[tuple[int, int]] = []
    runs = [Made(tmp_path, str(number)) for number in range(5)]
    (tmp_path / "3").write_text("made before")

    def watch(waiting: Any, running: Any) -> None:
        seen.append((len(waiting), len(running)))

    assert run(runs, watch=watch) == {str(n): "made before" if n == 3 else str(tmp_path / str(n)) for n in range(5)}
    assert len(processes) == 4 and all(process.returncode == 0 for process in processes)
    assert max(running for _, running in seen) <= 2 and seen[-1] == (0, 0)
    assert all(process.stdin is not None and process.stdin.closed for process in processes)


def test_every_device_is_one_run_s_at_a_time(tmp_path, processes):
    """Three devices for seven runs, of which each says which it sees, and when it began and ended."""
    code = (
        "import os, sys, pathlib, time; began = time.monotonic(); time.sleep(0.05)\n"
        "seen = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{seen} {began} {time.monotonic()}')"
    )
    places = Places(devices=("3", "GPU-ab", "5")).settled("cpu", 1)
    assert places.workers == 3
    found = [text.split() for text in run([Made(tmp_path, str(n), code) for n in range(7)], places).values()]
    assert {device for device, *_ in found} == {"3", "GPU-ab", "5"}
    for device in places.devices:
        spans = sorted((float(began), float(ended)) for seen, began, ended in found if seen == device)
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))


def test_places_as_they_are_settled(monkeypatch):
    monkeypatch.setattr(places_module, "usable_cores", lambda: 8)
    assert [Places().settled("cpu", threads).workers for threads in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 7")
    assert Places().settled("cuda", 4) == Places(workers=2, devices=("2", "7"))
    assert Places(workers=1).settled("cuda", 4).workers == 1
    assert Places(on="ray").settled("cuda", 4) == Places(workers=2, on="ray")
    with pytest.raises(UserError, match="devices must be different ones, got 1, 1"):
        Places(devices=("1", "1"))
    with pytest.raises(UserError, match="on a Ray cluster Ray gives runs their devices"):
        Places(devices=("1",), on="ray")


def test_a_run_that_would_be_written_elsewhere_is_refused(tmp_path, processes):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "a").symlink_to(elsewhere)
    silent = SimpleNamespace(update=lambda done, facts: None, note=lambda text: None)
    with pytest.raises(UserError, match=rf"{folder}/a must lie in {folder}, but leads to {elsewhere}: remove the link"):
        Runner(Places(workers=1), {}, "", set(), lambda: False, silent).make(Claimed([Made(folder, "a")], {}), "runs")
    assert elsewhere.read_text() == "mine" and not processes


def test_without_ray_a_cluster_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="studies on a cluster need the extra 'ray', but the package ray is absent"):
        run([Made(tmp_path, "never")], Places(workers=1, on="ray"))


def test_a_job_waits_for_another(tmp_path, processes):
    assert list(run([Made(tmp_path, "second", after="first"), Made(tmp_path, "first")])) == ["first", "second"]


def test_a_failure_passes_the_last_line_on_and_ends_the_others(tmp_path, processes):
    runs = [Made(tmp_path, "sleeps", SLEEPS), Made(tmp_path, "fails", FAILS), Made(tmp_path, "never")]
    with pytest.raises(UserError, match=rf"the run {tmp_path}/fails failed: the last line \(all of it: .*fails.log\)"):
        run(runs)
    assert [process.returncode for process in processes] == [-signal.SIGTERM, 1]


def test_a_process_that_is_ended_from_outside_is_named_by_its_signal(tmp_path, processes):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(UserError, match="was ended by SIGKILL; the same command continues"):
        run([Made(tmp_path, "killed", killed)])


def test_stopped_it_ends_its_processes_and_waits_for_them(tmp_path, processes):
    def stopped() -> bool:
        return (tmp_path / "sleeps.log").exists() and (tmp_path / "sleeps.log").stat().st_size > 0

    with pytest.raises(KeyboardInterrupt):
        run([Made(tmp_path, "sleeps", SLEEPS), Made(tmp_path, "next", WRITES)], Places(workers=1), stopped=stopped)
    assert [process.returncode for process in processes] == [-signal.SIGTERM] and not (tmp_path / "next").exists()


def test_a_process_that_does_not_heed_the_end_of_its_parent_ends_all_the_same():
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from deepdelta.lab.experiments import process\n"
        "process.GRACE_SECONDS = 0.1; process.end_with_parent(); print('at work', flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        time.sleep(0.3)
        assert process.poll() is None  # as long as the pipe is open
        process.stdin.close()
        assert process.wait() == 1


# Locks


def test_a_folder_is_held_once_and_its_holder_is_named(tmp_path):
    out = tmp_path / "new" / "out"
    with locked(out):
        assert (out / HELD).read_text() == f"{os.getpid()}\n"
        with pytest.raises(UserError, match=f"{out} is in use by process {os.getpid()}: wait for it, stop it, or give"):
            with locked(out):
                pytest.fail("held twice")
        (out / "results.json").write_text("{}")
    assert [path.name for path in out.iterdir()] == ["results.json"]
    with locked(out):
        pass


def test_nothing_is_left_of_a_command_that_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="refused"), locked(tmp_path / "new" / "out"):
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_the_lock_of_a_killed_command_is_free(tmp_path):
    (tmp_path / HELD).write_text("12345\n")
    with locked(tmp_path):
        assert (tmp_path / HELD).read_text() == f"{os.getpid()}\n"


def test_a_lock_that_its_holder_deleted_meanwhile_locks_nothing(tmp_path, monkeypatch):
    """Opened before the holder ended, locked after: another file stands there now, or none."""
    original, calls = fcntl.flock, []

    def flock(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / HELD).unlink()
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / HELD).read_text() == f"{os.getpid()}\n"
        with pytest.raises(UserError, match="is in use by process"), locked(tmp_path):
            pytest.fail("held twice")


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be a folder for results: File name too long\. Give another --out"):
        with locked(tmp_path / ("x" * 300)):
            pytest.fail("made")

"""The runs of an experiment side by side, each a process of its own (`process.py`), recorded the moment it ends."""

import concurrent.futures
import signal
import subprocess
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, NamedTuple, Protocol, runtime_checkable

from deepdelta.errors import UserError
from deepdelta.lab.experiments.cluster import LOST, ray_launcher
from deepdelta.lab.experiments.places import Places
from deepdelta.lab.experiments.process import command_of, spawn
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.run import Run
from deepdelta.lab.experiments.work import WORK, Work
from deepdelta.progress import Reporter, reporting
from deepdelta.training.trainer import stop_signals

POLL_SECONDS = 0.5

SHOWN = 2
"""Of the runs at work, those that the line of progress shows."""


class Claimed(NamedTuple):
    """What is there of some runs, looked at once."""

    missing: Sequence[Run]
    """Those to be made, in this order."""
    records: Mapping[str, RunRecord]
    """Those of the others, by name, and of those that they start from."""


@dataclass
class Runner:
    """Makes the runs of an experiment, some at a time; made by `running`."""

    places: Places
    work: Mapping[str, float]
    """Of every run, by name, in units."""
    unit: str
    done: set[str]
    """Names of the runs that have a record."""
    stopped: Callable[[], bool]
    reporter: Reporter

    def make(
        self, claimed: Claimed, phase: str, each: Callable[[Mapping[str, RunRecord]], object] = lambda records: None
    ) -> dict[str, RunRecord]:
        """The records of all that is claimed, by name, the missing ones made first.

        Args:
            each: is called after each run that is made, with the records so far.

        Raises:
            UserError: a run failed; its own message is passed on.
            KeyboardInterrupt: interrupted.
        """
        missing, records = claimed.missing, dict(claimed.records)
        for run in missing:
            run.check_inside()
        self.done -= {run.name for run in missing}

        def finish(run: Run) -> None:
            records[run.name] = run.finish()
            self.done.add(run.name)
            each(records)

        try:
            run_processes(
                missing,
                finish,
                places=self.places,
                stopped=self.stopped,
                watch=lambda waiting, running: self.report(waiting, running, phase),
            )
        except KeyboardInterrupt:
            for note in {run.interrupted for run in missing}:
                self.reporter.note(note)
            raise
        return records

    def report(self, waiting: Sequence[Run], running: Sequence[Run], phase: str) -> None:
        """Say how much is done, and where the first of the runs at work are."""
        facts = f"{self.unit}, {len(self.done)}/{len(self.work)} records ({phase})"
        made = behind(self.work, self.done, (*running, *waiting))
        self.reporter.update(made, ", ".join((facts, *(run.state for run in running[:SHOWN]))))


@runtime_checkable
class Process(Protocol):
    """What a run is at work in, as `subprocess.Popen` has it."""

    @property
    def stdin(self) -> IO[bytes] | None: ...

    def wait(self) -> int: ...

    def terminate(self) -> None: ...


@contextmanager
def running(label: str, work: Iterable[tuple[Run, float]], unit: str, places: Places) -> Iterator[Runner]:
    """What makes the runs of an experiment, each of which takes so many units of work.

    Progress counts work over all phases; the time left follows from the pace at which it is done.
    """
    units = {run.name: (run, amount) for run, amount in work}
    by_name = {name: amount for name, (_, amount) in units.items()}
    done = {name for name, (run, _) in units.items() if name in run.records}
    total, first = behind(by_name, set(by_name), ()), behind(by_name, done, (run for run, _ in units.values()))
    told = next(run.records.path for run, _ in units.values()).with_name(WORK)
    Work(amounts=by_name, made=float(first), began=time.time()).write(told)
    try:
        with stop_signals() as stopped, reporting(label, total, first) as reporter:
            yield Runner(places, by_name, unit, done, stopped, reporter)
    finally:
        told.unlink(missing_ok=True)


def behind(work: Mapping[str, float], done: Container[str], runs: Iterable[Run]) -> int:
    """The work that is done, of these runs in parts; at least one when all of it is, however short."""
    parts = sum(work[run.name] * run.share for run in runs if run.name not in done)
    names = [name for name in work if name in done]
    total = sum(work[name] for name in names) + parts
    return max(1, round(total)) if len(names) == len(work) else int(total)


def run_processes(
    runs: Iterable[Run],
    finish: Callable[[Run], object],
    *,
    places: Places,
    stopped: Callable[[], bool],
    watch: Callable[[Sequence[Run], Sequence[Run]], object],
) -> None:
    """Have every run made that has not ended, and `finish` called with each when it has.

    Args:
        places: settled, so with a number of workers; without devices, runs see what this process sees.
        stopped: whether to stop: the processes get SIGTERM and are waited for.
        watch: is called as watch(waiting, running) again and again, and at the end.

    Raises:
        UserError: a process ended without its run; its last line is passed on and the others are stopped.
        KeyboardInterrupt: stopped.
    """
    workers = places.workers or 1
    start: Callable[[Run, str | None], Process] = ray_launcher() if places.on == "ray" else launch
    waiting = list(runs)
    running: dict[Future[int], tuple[Run, Process, str | None]] = {}
    free: list[str | None] = list(places.devices) or [None] * workers
    with ThreadPoolExecutor(workers) as waiters:
        try:
            while (waiting or running) and not stopped():
                for run in list(waiting):
                    if run.waits({one.name for one in (*waiting, *(other for other, *_ in running.values()))}):
                        continue
                    if run.ended:
                        waiting.remove(run)
                        finish(run)
                    elif free and len(running) < workers:
                        process = start(run, device := free.pop(0))
                        waiting.remove(run)
                        running[waiters.submit(process.wait)] = run, process, device
                if waiting and not running:
                    time.sleep(POLL_SECONDS)
                done, _ = concurrent.futures.wait(running, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    run, process, device = running.pop(future)
                    _close(process)
                    free.append(device)
                    if run.ended:
                        finish(run)
                    elif future.result() == LOST:
                        waiting.append(run)
                    else:
                        raise UserError(_failure(run, future.result()))
                watch(waiting, [run for run, *_ in running.values()])
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()
                _close(process)
    if stopped():
        raise KeyboardInterrupt


def launch(run: Run, device: str | None = None) -> subprocess.Popen[bytes]:
    """Start the process of a run.

    Args:
        device: the one that it sees; None: all.
    """
    variables = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    return spawn(command_of(run.command()), run.log, run.threads, variables)


def _close(process: Process) -> None:
    """Let go of the pipe of a process that has ended."""
    if process.stdin is not None:
        process.stdin.close()


def _failure(run: Run, code: int) -> str:
    if code < 0:
        return f"the run {run.path} was ended by {signal.Signals(-code).name}; the same command continues."
    lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"the run {run.path} failed: {lines[-1] if lines else f'exit code {code}'} (all of it: {run.log})"

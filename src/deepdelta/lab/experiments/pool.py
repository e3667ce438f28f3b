"""Jobs side by side, each a process of its own that ends with its parent: the runs of studies and of tasks.

A process is started as `python -m deepdelta.lab.experiments.pool MODULE ARGUMENTS`. Its standard input is a pipe that
its parent holds and never writes to. The system closes it when the parent ends, by SIGKILL too; then the process ends.
"""

import concurrent.futures
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from deepdelta.errors import UserError

Record = TypeVar("Record")

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
"""How long a process whose parent has ended may go on to finish its step and save it."""


@dataclass(frozen=True)
class Job(Generic[Record]):
    """One record, and the process that makes what it is read from.

    Fields:
        name: of the record. place: what messages call the run.
        command: module and arguments, asked for when the process is about to start.
        ended: whether the record can be read. record: reads it.
        log: takes what the process prints. threads: of the process.
        waits: whether it can neither start nor be read yet, given the names of the jobs without a record.
    """

    name: str
    place: Path
    command: Callable[[], list[str]]
    ended: Callable[[], bool]
    record: Callable[[], Record]
    log: Path
    threads: int = 1
    waits: Callable[[Container[str]], bool] = lambda unfinished: False


Watch = Callable[[Sequence[Job[Any]], Sequence[Job[Any]]], None]
"""watch(waiting, running)"""


def run_jobs(
    jobs: Iterable[Job[Record]],
    records: dict[str, Record],
    *,
    workers: int,
    stopped: Callable[[], bool],
    watch: Watch,
) -> None:
    """Put the record of every job into `records`, by name, as it is made.

    Args:
        workers: processes side by side.
        stopped: whether to stop: the processes get SIGTERM and are waited for.
        watch: is called again and again, and at the end.

    Raises:
        UserError: a process ended without its record; its last line is passed on and the others are stopped.
        KeyboardInterrupt: stopped.
    """
    waiting = list(jobs)
    running: dict[Future[int], tuple[Job[Record], subprocess.Popen[bytes]]] = {}
    with ThreadPoolExecutor(workers) as waiters:
        try:
            while (waiting or running) and not stopped():
                for job in list(waiting):
                    if job.waits({one.name for one in (*waiting, *(other for other, _ in running.values()))}):
                        continue
                    if job.ended():
                        waiting.remove(job)
                        records[job.name] = job.record()
                    elif len(running) < workers:
                        process = launch(job)
                        waiting.remove(job)
                        running[waiters.submit(process.wait)] = job, process
                if waiting and not running:
                    time.sleep(POLL_SECONDS)
                done, _ = concurrent.futures.wait(running, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    job, process = running.pop(future)
                    _close(process)
                    if not job.ended():
                        raise UserError(_failure(job, future.result()))
                    records[job.name] = job.record()
                watch(waiting, [job for job, _ in running.values()])
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
                _close(process)
    if stopped():
        raise KeyboardInterrupt


def launch(job: Job[Any]) -> subprocess.Popen[bytes]:
    """Start the process of a job: in a session of its own, so that Ctrl-C reaches it once, through its parent."""
    command = [sys.executable, "-m", "deepdelta.lab.experiments.pool", *job.command()]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    with job.log.open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _close(process: subprocess.Popen[bytes]) -> None:
    """Let go of the pipe of a process that has ended."""
    if process.stdin is not None:
        process.stdin.close()


def _failure(job: Job[Any], code: int) -> str:
    if code < 0:
        return f"the run {job.place} was ended by {signal.Signals(-code).name}; the same command continues."
    lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"the run {job.place} failed: {lines[-1] if lines else f'exit code {code}'} (all of it: {job.log})"


def _end_with_parent() -> None:
    """Have this process end when its parent does, as by SIGTERM; where that is not heeded in time, all the same."""

    def watch() -> None:
        # Not by sys.stdin, whose lock a thread at work there would hold when the interpreter ends.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except UserError as error:
        sys.exit(f"error: {error}")

"""Runs of a study as tasks of a Ray cluster, whose nodes share the study's folder; Ray is an optional extra.

A task holds the process of a run as the local pool does, and dies with it; a run whose task is lost with its worker
goes on from its checkpoint in another, once the lock of its directory is free.
"""

import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepdelta.errors import require
from deepdelta.lab.experiments.process import command_of, spawn

if TYPE_CHECKING:
    from deepdelta.lab.experiments.run import Run

POLL_SECONDS = 0.2

LOST = -1000
"""The code of a run whose worker has gone, with which no process ends."""


class Task:
    """A run at work in the cluster, as `subprocess.Popen` has it."""

    stdin = None

    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference

    def wait(self) -> int:
        errors = self.ray.exceptions
        try:
            return int(self.ray.get(self.reference))
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError):
            return LOST
        except errors.TaskCancelledError:
            return -15

    def terminate(self) -> None:
        self.ray.cancel(self.reference, force=False)


def make(command: list[str], log: str, threads: int) -> int:
    """In a worker: make the run in a process of its own, which ends with the worker; its exit code."""
    process = spawn(command, Path(log), threads)
    try:
        while True:
            # Ray cancels a task by a KeyboardInterrupt between two instructions, which one long wait would not see.
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_SECONDS)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        return process.wait()


def require_ray() -> None:
    """
    Raises:
        UserError: Ray is absent.
    """
    require("studies on a cluster", "ray", "ray")


def ray_launcher() -> Callable[["Run", str | None], Task]:
    """What starts a run in the cluster that RAY_ADDRESS names, or in one of this machine.

    Raises:
        UserError: Ray is absent.
    """
    require_ray()
    import ray
    import torch

    if not ray.is_initialized():
        ends = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=False, include_dashboard=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ends)  # Ray's own would end the study before its runs have saved their step
    gpus = 1 if torch.cuda.is_available() else 0

    def start(run: "Run", device: str | None) -> Task:
        # The pool decides what is made again, since it alone knows what is still at work.
        remote = ray.remote(num_cpus=run.threads, num_gpus=gpus, max_retries=0)(make)
        return Task(ray, remote.remote(command_of(run.command()), str(run.log), run.threads))

    return start

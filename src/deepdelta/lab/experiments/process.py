"""The process of a run: `python -m deepdelta.lab.experiments.process MODULE ARGUMENTS`; it ends with its parent.

Its standard input is a pipe that its parent holds and never writes to. The system closes it when the parent ends, by
SIGKILL too; then the process ends.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from deepdelta.errors import UserError

GRACE_SECONDS = 10.0
"""How long a process whose parent has ended may go on to finish its step and save it."""


def command_of(words: Sequence[str]) -> list[str]:
    """What starts MODULE ARGUMENTS as such a process."""
    return [sys.executable, "-m", "deepdelta.lab.experiments.process", *words]


def spawn(
    command: Sequence[str], log: Path, threads: int, variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, so that Ctrl-C reaches it once, through its parent; it says all to `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **variables}
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def end_with_parent() -> None:
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
    end_with_parent()
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except UserError as error:
        sys.exit(f"error: {error}")

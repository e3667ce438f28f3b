"""Ctrl-C while the command `deepdelta` is still importing: one line and exit code 130, as later on.

The package's first import, since those that follow take seconds. A program that imports the package is left alone.
"""

import os
import signal
import sys
from pathlib import Path


def _stop(number: int, frame: object) -> None:
    # Not by an exception: libraries turn those that arise while they are imported into errors of their own.
    os.write(2, b"interrupted\n")
    os._exit(130)


def imported() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as in any Python program."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


program = Path(sys.argv[0]).name if sys.argv else ""
if program == "deepdelta" or (program == "-m" and "deepdelta" in sys.orig_argv):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)

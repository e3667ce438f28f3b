"""Where numba keeps compiled code from process to process, and whether that can be trusted.

numba's files are pickles: who can write them can have code run by whoever loads them.
"""

import inspect
import os
import pickle
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache

from deepdelta.errors import UserError

MEND = "set NUMBA_CACHE_DIR to a folder of your own that nobody else can write"

PATIENCE = 2.0
"""Seconds of compiling that need no word."""

# What reading a pickle raises that was cut short or overwritten; pickle, by its documentation, keeps no closed list.
DAMAGED = (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, ImportError)


def keeping_problem(function: Callable[..., Any] | None = None) -> str | None:
    """Why what numba compiles of a function, or of this folder's, cannot be kept, or None where it can."""
    try:
        folder = Path(_cache(function or keeping_problem).cache_path)
    except RuntimeError:  # which numba raises where it finds no place
        return f"numba finds no folder that it can write for compiled code; {MEND}"
    here, above = folder.stat(), folder.parent.stat()
    # Who owns the package's source has its code run in any case.
    if here.st_uid not in (0, os.getuid(), Path(__file__).stat().st_uid):
        return f"numba's compiled code in {folder} belongs to another user, who could have it run theirs; {MEND}"
    if _written_by_others(here) or (_written_by_others(above) and not above.st_mode & stat.S_ISVTX):
        return f"numba's compiled code in {folder} can be written by others, who could have it run theirs; {MEND}"
    if here.st_uid == os.getuid() and not os.listdir(folder):
        with suppress(FileNotFoundError):  # a process beside this one removed it
            folder.chmod(stat.S_IRWXU)  # numba has just made it, as the umask says
    return None


def _cache(function: Callable[..., Any]) -> Any:
    return FunctionCache(inspect.unwrap(function))


def _written_by_others(found: os.stat_result) -> bool:
    """A group of the owner's own number has, by convention, no other member."""
    group = found.st_mode & stat.S_IWGRP and found.st_gid != found.st_uid
    return bool(found.st_mode & stat.S_IWOTH or group)


def prepare(function: Callable[..., Any]) -> None:
    """Make sure that what numba kept of a function can be loaded: what was cut short is dropped, and so made anew.

    Raises:
        UserError: it cannot be kept.
    """
    if problem := keeping_problem(function):
        raise UserError(f"{problem}; or use the backend 'reference'.")
    cache = _cache(function)
    files = cache._cache_file
    try:
        for name in files._load_index().values():
            files._load_data(name)
    except FileNotFoundError:
        return  # numba makes what is missing
    except DAMAGED:
        cache.flush()


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Within, code is compiled: said on stderr when it takes longer than PATIENCE, and then how long it took.

    On stderr whatever that is: results of a command are on stdout.
    """
    began, said = time.monotonic(), threading.Event()

    def say() -> None:
        said.set()
        print(f"compiling {what} for this machine, once: later processes load it", file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if said.is_set():
        print(f"compiled {what} in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

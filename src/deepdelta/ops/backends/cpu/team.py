"""Loops compiled by numba, run by the OpenMP threads that torch itself computes with.

A pool of our own would wait for the cores on which torch's threads still spin after their last operation. So a loop is
compiled to a C function and handed to the OpenMP library that torch was linked with. Where torch has no such library
(on macOS it has another kind), the calling thread does all of it.

A loop's one argument is the address of a table of 64-bit numbers, which `records.py` lays out.
"""

import ctypes
import hashlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite.binding
import numba
import torch
from numba import types
from numba.extending import overload

from deepdelta.ops.backends.cpu.kept import prepare

# Reassociation is what lets a sum use vector registers; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz", "afn"}
NUMBER, COUNT = "deepdelta_thread_number", "deepdelta_thread_count"
OF_OPENMP = {NUMBER: "omp_get_thread_num", COUNT: "omp_get_num_threads"}
thread_number, thread_count = (types.ExternalFunction(name, types.int32()) for name in (NUMBER, COUNT))


@cache
def _openmp() -> ctypes.CDLL | None:
    """torch's OpenMP library, by way of the symbols that libtorch_cpu resolved: never a second copy of it."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    opened = ctypes.CDLL(str(library)) if library.exists() else None
    if opened is None or not all(hasattr(opened, name) for name in ("GOMP_parallel", *OF_OPENMP.values())):
        return None
    opened.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    opened.GOMP_parallel.restype = None
    for ours, theirs in OF_OPENMP.items():
        address = ctypes.cast(getattr(opened, theirs), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(ours, address)
    return opened


def threads() -> int:
    """How many threads share a loop: as many as torch uses, or one where its OpenMP library cannot be called."""
    return torch.get_num_threads() if _openmp() is not None else 1


def compiled(function: Any, *, kept: bool = False) -> Any:
    """A function for loops to call, compiled for the types that it is called with.

    Args:
        kept: whether it is kept on disk by itself: for what is called without a loop, which keeps what it calls.
    """
    function = _named(function)
    if kept:
        prepare(function)
    wrappers: Any = {"no_cpython_wrapper": not kept, "no_cfunc_wrapper": not kept}
    return numba.njit(function, nogil=True, fastmath=FAST, cache=kept, error_model="numpy", **wrappers)


def _named(function: Any, *modules: ModuleType) -> Any:
    """The function under a name that tells all that its compiled code depends on.

    numba's cache looks at the function's own file alone, not at what is compiled into it from others. It has one index
    per name, in which processes that save at the same time may take each other's numbers, and then each other's code.

    Args:
        modules: where what it calls stands, other than its own file and this folder.
    """
    # Unwrapped of the checks that the tests put around every function of the package.
    function = inspect.unwrap(function)
    sources = map(_source, (sys.modules[function.__module__], *modules))
    closed = repr([cell.cell_contents for cell in function.__closure__ or ()])
    key = hashlib.sha256(b"".join([f"{closed} {_openmp() is None}".encode(), _FOLDER, *sources])).hexdigest()
    function.__qualname__ += f"_{key[:16]}"
    return function


_FOLDER = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))


@cache
def _source(module: ModuleType) -> bytes:
    """A module's file as it was at import, when `compiled` asks for it: it may be edited while this process runs."""
    return Path(module.__file__ or "").read_bytes()


def loop(share: Callable[[Any], None], *modules: ModuleType) -> Any:
    """The C function that does one thread's part of the work that a table describes, kept on disk for other processes.

    Args:
        share: share(table), whose part is `part(team)`; it may close over types, numbers and text.
        modules: where the functions that share calls stand, other than its own file and this folder.
    """
    share = _named(share, *modules)
    prepare(share)
    return numba.cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")(share)


def run(loop: Any, table: bytes | int, team: int) -> None:
    """Run a loop with a table, or what stands at its address, on a team of that many threads, `threads()` at most."""
    openmp = _openmp()
    if team == 1 or openmp is None:
        _ALONE(loop.address)(table)
    else:
        openmp.GOMP_parallel(loop.address, table, team, 0)


_ALONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def part(team):
    """Within a loop that a team of that size runs: which part is this thread's, and of how many."""


part = inspect.unwrap(part)


@overload(part, inline="always")
def _part(team):
    if _openmp() is None:
        return lambda team: (0, 1)
    return lambda team: (thread_number(), thread_count()) if team > 1 else (0, 1)

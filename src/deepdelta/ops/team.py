"""Loops compiled by numba, run by the OpenMP threads that torch itself computes with.

A pool of our own would wait for the cores on which torch's threads still spin after their last operation. So a loop is
compiled to a C function and handed to the OpenMP library that torch was linked with. Where torch has no such library
(on macOS it has another kind), the calling thread does all of it.

A loop's one argument is the address of a table of 64-bit numbers: sizes, and addresses of tensors, of which `array_at`
makes arrays.
"""

import ctypes
import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from deepdelta.ops.precision import accumulation_dtype

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


def compiled(function: Any) -> Any:
    """A function for loops to call, compiled for the types that it is called with."""
    # Unwrapped of the checks that the tests put around every function of the package.
    return numba.njit(nogil=True, fastmath=FAST, cache=True, error_model="numpy")(inspect.unwrap(function))


class Loop(NamedTuple):
    team: Any
    """Run by every thread; None where there is no team."""
    alone: Any


def loop(make: Callable[[int | None, int], Any], *modules: ModuleType) -> Loop:
    """C functions that do one thread's part of the work that a table describes, kept on disk from process to process.

    Args:
        make: make(team, source) returns share(table), whose part is `part(team, source)`. Besides types, it may
            close over plain numbers alone: all of them are the key in the cache.
        modules: where the functions that share calls stand. The cache looks at the file of share; what is compiled into
            it from elsewhere counts through `source`, a number made of these files and this one.
    """
    texts = [Path(module.__file__ or "").read_bytes() for module in (sys.modules[__name__], *modules)]
    source = int.from_bytes(hashlib.sha256(b"".join(texts)).digest()[:4], "big")
    argument = types.void(types.CPointer(types.int64))

    def made(team: int | None) -> Any:
        return numba.cfunc(argument, cache=True)(inspect.unwrap(make(team, source)))

    return Loop(None if _openmp() is None else made(1), made(None))


def run(loop: Loop, table: Sequence[int], team: int) -> None:
    """Run a loop on a team of that many threads, `threads()` at most."""
    numbers = np.array(table, np.int64)
    openmp = _openmp()
    if team == 1 or openmp is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loop.alone.address)(numbers.ctypes.data)
    else:
        openmp.GOMP_parallel(loop.team.address, numbers.ctypes.data, team, 0)


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor's numbers lie; 0 for none."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


class Kinds(NamedTuple):
    """The types of numbers in a loop: as stored (bf16, which numpy lacks, as the 16 bits it is), and in sums."""

    stored: Any
    wide: Any


def kinds(dtype: torch.dtype) -> Kinds:
    wide = np.float64 if accumulation_dtype(dtype) == torch.float64 else np.float32
    return Kinds(np.uint16 if dtype == torch.bfloat16 else wide, wide)


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), inspect.unwrap(generate)


def part(team, source):
    """Within a loop: which part is this thread's, and of how many; all of it where `team` is None."""


def array_at(address, shape, kind):
    """Within a loop: the array at an address; None where `kind` is, so that what it is for is left out."""


def load(value):
    """Within a loop: the number that a stored value stands for."""


def store(value, like):
    """Within a loop: what to store in an array of elements as `like`: rounded to nearest, ties to even."""


def _widened(value):
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def _rounded(value, like):
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    half = np.uint32(32767) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + half) >> np.uint32(16))


part, array_at, load, store = (inspect.unwrap(function) for function in (part, array_at, load, store))


@overload(part, inline="always")
def _part(team, source):
    if isinstance(team, types.NoneType):
        return lambda team, source: (0, 1)
    return lambda team, source: (thread_number(), thread_count())


@overload(array_at, inline="always")
def _array_at(address, shape, kind):
    if isinstance(kind, types.NoneType):
        return lambda address, shape, kind: None
    return lambda address, shape, kind: numba.carray(_pointer(address), shape, kind)  # type: ignore[attr-defined, call-arg]


@overload(load, inline="always")
def _load(value):
    return inspect.unwrap(_widened) if value == types.uint16 else lambda value: value


@overload(store, inline="always")
def _store(value, like):
    return inspect.unwrap(_rounded) if like == types.uint16 else lambda value, like: value

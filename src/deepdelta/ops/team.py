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

from deepdelta.ops.kept import prepare
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


def compiled(function: Any, *, kept: bool = False) -> Any:
    """A function for loops to call, compiled for the types that it is called with.

    Args:
        kept: whether it is kept on disk by itself: for what is called without a loop, which keeps what it calls.
    """
    function = _named(function)
    if kept:
        prepare(function)
    return numba.njit(nogil=True, fastmath=FAST, cache=kept, error_model="numpy")(function)


def _named(function: Any, *modules: ModuleType) -> Any:
    """The function under a name that tells all that its compiled code depends on.

    numba's cache looks at the function's own file alone, not at what is compiled into it from others. It has one index
    per name, in which processes that save at the same time may take each other's numbers, and then each other's code.

    Args:
        modules: where what it calls stands, other than its own file and this one.
    """
    # Unwrapped of the checks that the tests put around every function of the package.
    function = inspect.unwrap(function)
    sources = map(_source, (sys.modules[__name__], sys.modules[function.__module__], *modules))
    closed = repr([cell.cell_contents for cell in function.__closure__ or ()])
    key = hashlib.sha256(b"".join([closed.encode(), *sources])).hexdigest()
    function.__qualname__ += f"_{key[:16]}"
    return function


@cache
def _source(module: ModuleType) -> bytes:
    """A module's file as it was at import, when `compiled` asks for it: it may be edited while this process runs."""
    return Path(module.__file__ or "").read_bytes()


class Loop(NamedTuple):
    team: Any
    """Run by every thread; None where there is no team."""
    alone: Any


def loop(make: Callable[[int | None], Any], *modules: ModuleType) -> Loop:
    """C functions that do one thread's part of the work that a table describes, kept on disk from process to process.

    Args:
        make: make(team) returns share(table), whose part is `part(team)`; share may close over types and numbers alone.
        modules: where the functions that share calls stand, other than its own.
    """
    argument = types.void(types.CPointer(types.int64))

    def made(team: int | None) -> Any:
        share = _named(make(team), *modules)
        prepare(share)
        return numba.cfunc(argument, cache=True, error_model="numpy")(share)

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
    """The types of numbers in a loop: as stored, and in sums. What numba has no arithmetic for is stored as the 16 bits
    that it is: bf16 as uint16, fp16 as int16."""

    stored: Any
    wide: Any


def kinds(dtype: torch.dtype) -> Kinds:
    wide = np.float64 if accumulation_dtype(dtype) == torch.float64 else np.float32
    return Kinds({torch.bfloat16: np.uint16, torch.float16: np.int16}.get(dtype, wide), wide)


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), inspect.unwrap(generate)


def part(team):
    """Within a loop: which part is this thread's, and of how many; all of it where `team` is None."""


def array_at(address, shape, kind):
    """Within a loop: the array at an address; None where `kind` is, so that what it is for is left out."""


def load(value):
    """Within a loop: the number that a stored value stands for."""


def store(value, like):
    """Within a loop: what to store in an array of elements as `like`: rounded to nearest, ties to even."""


def _of_bf16(value):
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def _to_bf16(value, like):
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    half = np.uint32(32767) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + half) >> np.uint32(16))


# fp16 by its bits too: LLVM's own conversion calls functions that are absent where the processor has no instruction.
INFINITE, NORMAL, SHIFT = np.uint32(0x7C00), np.uint32(0x0400), np.uint32(13)
WIDE_INFINITE, WIDE_NORMAL = np.uint32(0x7F800000), np.uint32(0x38800000)  # WIDE_NORMAL: NORMAL in fp32
BIAS, TOO_LARGE = np.uint32(0x38000000), np.uint32(0x477FF000)  # of exponents; what rounds to infinity
LEAST = np.float32(2.0**-24)


@compiled
def _of_fp16(value):
    magnitude = np.uint32(np.uint32(value) & np.uint32(0x7FFF))
    if magnitude >= INFINITE:
        wide = np.uint32(np.uint32(magnitude << SHIFT) | WIDE_INFINITE)
    elif magnitude >= NORMAL:
        wide = np.uint32(np.uint32(magnitude << SHIFT) + BIAS)
    else:
        wide = np.float32(np.float32(magnitude) * LEAST).view(np.uint32)
    sign = np.uint32(np.uint32(np.uint32(value) & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(wide | sign).view(np.float32)


@compiled
def _to_fp16(value):
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if magnitude > WIDE_INFINITE:
        narrow = np.uint32(INFINITE | np.uint32(0x0200))
    elif magnitude >= TOO_LARGE:
        narrow = INFINITE
    elif magnitude >= WIDE_NORMAL:
        half = np.uint32(np.uint32(0x0FFF) + np.uint32(np.uint32(magnitude >> SHIFT) & np.uint32(1)))
        narrow = np.uint32(np.uint32(np.uint32(magnitude - BIAS) + half) >> SHIFT)
    else:
        # The numbers next to 1/2 are as far apart as the smallest of fp16.
        moved = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32)
        narrow = np.uint32(moved - np.float32(0.5).view(np.uint32))
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.int16(np.uint16(narrow | sign))


part, array_at, load, store = (inspect.unwrap(function) for function in (part, array_at, load, store))


@overload(part, inline="always")
def _part(team):
    if isinstance(team, types.NoneType):
        return lambda team: (0, 1)
    return lambda team: (thread_number(), thread_count())


@overload(array_at, inline="always")
def _array_at(address, shape, kind):
    if isinstance(kind, types.NoneType):
        return lambda address, shape, kind: None
    return lambda address, shape, kind: numba.carray(_pointer(address), shape, kind)  # type: ignore[attr-defined, call-arg]


@overload(load, inline="always")
def _load(value):
    known = {types.uint16: _of_bf16, types.int16: lambda value: _of_fp16(value)}
    return inspect.unwrap(known.get(value, lambda value: value))


@overload(store, inline="always")
def _store(value, like):
    known = {types.uint16: _to_bf16, types.int16: lambda value, like: _to_fp16(value)}
    return inspect.unwrap(known.get(like, lambda value, like: value))

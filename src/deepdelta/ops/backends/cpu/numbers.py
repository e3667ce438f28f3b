"""The numbers of compiled loops: as tensors store them, and as sums are made."""

import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_item_pointer, get_or_insert_function, unpack_tuple
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from deepdelta.ops.precision import accumulation_dtype


class Kinds(NamedTuple):
    """The types of numbers in a loop: as stored, and in sums. What numba has no arithmetic for is stored as the 16 bits
    that it is: bf16 as uint16, fp16 as int16."""

    stored: Any
    wide: Any


def kinds(dtype: torch.dtype) -> Kinds:
    wide = np.float64 if accumulation_dtype(dtype) == torch.float64 else np.float32
    return Kinds({torch.bfloat16: np.uint16, torch.float16: np.int16}.get(dtype, wide), wide)


def _of_bf16(value):
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def _to_bf16(value):
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


_of_bf16, _to_bf16, _of_fp16, _to_fp16 = map(inspect.unwrap, (_of_bf16, _to_bf16, _of_fp16, _to_fp16))


def _load(typing_context, value):
    """Within a loop: the number that a stored value stands for."""
    known = {types.uint16: _of_bf16, types.int16: _of_fp16}
    return _converted(known.get(value), types.float32, value)


def _store(typing_context, value, like):
    """Within a loop: what to store in an array of elements as `like`: rounded to nearest, ties to even."""
    known = {types.uint16: _to_bf16, types.int16: _to_fp16}
    return _converted(known.get(like), like, value, like)


def _converted(function, result, *given):
    """What an intrinsic returns that calls a function, or hands its first argument on where that is None."""
    if function is None:
        return given[0](*given), inspect.unwrap(lambda context, builder, signature, arguments: arguments[0])
    called = result(given[0])

    def generate(context, builder, signature, arguments):
        return context.compile_internal(builder, function, called, arguments[:1])

    return result(*given), inspect.unwrap(generate)


def _fetch(typing_context, array, index, written):
    """Within a loop: have the processor bring the line of memory that an element is in, to be read or to be written."""

    def generate(context, builder, signature, given):
        array = make_array(signature.args[0])(context, builder, given[0])
        place = get_item_pointer(context, builder, signature.args[0], array, unpack_tuple(builder, given[1]))
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_second_level, data = number(2), number(1)
        choices = [number(int(signature.args[2].literal_value)), to_second_level, data]
        builder.call(prefetch, [builder.bitcast(place, byte), *choices])
        return context.get_dummy_value()

    return types.none(array, index, written), inspect.unwrap(generate)


load: Any = intrinsic(_load)
store: Any = intrinsic(_store)
fetch: Any = intrinsic(prefer_literal=True)(_fetch)

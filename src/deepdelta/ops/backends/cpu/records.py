"""Kernels whose arguments are fields of records: found by name, checked, and laid out by what the records declare.

The table that a loop gets: the size of the team, the number of items to share out, the sizes of axes, and a word for
each argument, a number or the address of a tensor. From the same layout the loop makes what the function takes.
"""

import inspect
import struct
import sys
from functools import lru_cache
from itertools import chain
from math import prod
from operator import itemgetter
from types import FunctionType
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from torch import Tensor

from deepdelta.ops.backends.cpu.kept import announced
from deepdelta.ops.backends.cpu.numbers import kinds
from deepdelta.ops.backends.cpu.team import loop, part, run, threads
from deepdelta.ops.precision import accumulation_dtype


class Field(NamedTuple):
    """An argument: a tensor's kind and axes, as in `ops/step/arguments.py`, or `real` or `integer`."""

    name: str
    kind: str
    axes: tuple[str, ...]
    optional: bool


class Expected(NamedTuple):
    """What a tensor must be in one call."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    optional: bool


class Kernel:
    """Called with records, runs `function(first, last, one, ...)` on each thread's own run of items.

    Args:
        function: compiled; its arguments from the fourth on are fields of the records. `one` is 1 as sums are made.
        shared: the axes whose items are shared out.
        records: classes of NamedTuples, with annotated tensors.

    Raises:
        TypeError: an argument that no record has, here; when called, other records, or tensors of another dtype, shape
            or layout than declared, before an address is taken.
    """

    def __init__(self, function: Any, shared: str, *records: type) -> None:
        hints = [hint for record in records for hint in get_type_hints(record, include_extras=True).items()]
        names, known = list(inspect.signature(function.py_func).parameters)[3:], [name for name, _ in hints]
        if unknown := [name for name in names if known.count(name) != 1]:
            owners = ", ".join(record.__name__ for record in records)
            raise TypeError(f"arguments must be in one record each of {owners}, but {', '.join(unknown)} are not")
        places = [known.index(name) for name in names]
        self._function, self._records, self._take = function, records, itemgetter(*places)
        self._fields = [_field(*hints[place]) for place in places]
        self._shared = len(shared.split())
        axes = dict.fromkeys(chain(shared.split(), *(field.axes for field in self._fields)))
        self._axes = [axis for axis in axes if axis != "*"]
        self._sized = [  # by axis: the arguments that have it, and where
            [(place, field.axes.index(axis)) for place, field in enumerate(self._fields) if axis in field.axes]
            for axis in self._axes
        ]
        numbers = ("d" if field.kind == "real" else "q" for field in self._fields)
        self._table = struct.Struct("=" + "q" * (2 + len(self._axes)) + "".join(numbers))
        self._stored = next(place for place, field in enumerate(self._fields) if field.kind == "stored")
        self._expected = lru_cache(maxsize=256)(self._expect)
        self._loops: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *records: tuple[Any, ...]) -> None:
        if tuple(map(type, records)) != self._records:
            raise TypeError(f"{self._function.__name__} takes {self._records}, got {tuple(map(type, records))}")
        values = self._take(sum(records, ()))
        sizes = tuple([_size(values, places) for places in self._sized])
        items = prod(sizes[: self._shared])
        first = values[self._stored]
        stored, numbers = (first.dtype, first.numel()) if isinstance(first, Tensor) else (torch.float32, 0)
        team = team_of(items, numbers)
        words = [team, items, *sizes]
        for value, expected in zip(values, self._expected(stored, sizes, team), strict=True):
            if expected is None:
                words.append(value or 0)
            elif value is None and expected.optional:
                words.append(0)
            elif (
                isinstance(value, Tensor)
                and value.shape == expected.shape
                and value.dtype is expected.dtype
                and value.is_contiguous()
                and value.is_cpu
            ):
                words.append(value.data_ptr())
            else:
                must = f"{expected.name} must be {expected.dtype} {expected.shape}, contiguous on the CPU"
                raise TypeError(f"{must}, got {_told(value)}")
        run(self._loop(stored, values), self._table.pack(*words), team)

    def _expect(self, stored: torch.dtype, sizes: tuple[int, ...], team: int) -> list[Expected | None]:
        """What each argument must be, where sizes are these; None for a number."""
        by_axis = dict(zip(self._axes, sizes, strict=True), **{"*": team})
        dtypes = {"stored": stored, "wide": accumulation_dtype(stored)}
        return [
            Expected(name, dtypes[kind], tuple([by_axis[axis] for axis in axes]), optional) if axes else None
            for name, kind, axes, optional in self._fields
        ]

    def _loop(self, dtype: torch.dtype, values: tuple[Any, ...]) -> Any:
        """Compiled for a dtype, and for which arguments are None."""
        key = (dtype, *[value is None for value in values])
        if key in self._loops:
            return self._loops[key]
        stored, wide = (np.dtype(kind).name for kind in kinds(dtype))
        by_kind = {"stored": stored, "wide": wide, "real": wide, "integer": "int64"}
        words = (
            "none" if value is None else ":".join([by_kind[field.kind], *field.axes])
            for value, field in zip(values, self._fields, strict=True)
        )
        layout = " ".join([":".join(self._axes), *words])
        module, one = sys.modules[self._function.__module__], kinds(dtype).wide

        def share(at):
            thread, count = part(at[0])
            first, last = at[1] * thread // count, at[1] * (thread + 1) // count
            function(first, last, one(1), *arguments(at, thread, layout))  # noqa: F821

        share = inspect.unwrap(share)  # of the checks that the tests put around every function of the package
        # A global: numba asks of what a function closes over that it be the same in every process.
        share = FunctionType(share.__code__, {**globals(), "function": self._function}, None, None, share.__closure__)
        share.__qualname__ = self._function.__name__.strip("_")
        with announced(f"the loop '{share.__qualname__}'"):
            self._loops[key] = loop(share, module)
        return self._loops[key]


def _size(values: tuple[Any, ...], places: list[tuple[int, int]]) -> int:
    """Of an axis, by the first tensor that has it; 0 where none is there."""
    for place, axis in places:
        if values[place] is not None:
            return int(values[place].shape[axis])
    return 0


def _told(value: Tensor | None) -> str:
    return "none" if value is None else f"{value.dtype} {tuple(value.shape)} on {value.device}"


SHARE = 1 << 15
"""Numbers of a state that are worth another thread, which takes some 20 microseconds to wake."""


def team_of(items: int, numbers: int) -> int:
    """How many threads share that many items, of so many numbers in all."""
    return max(1, min(threads(), items, numbers // SHARE))


def _field(name: str, hint: Any) -> Field:
    kind, *axes = getattr(hint, "__metadata__", ("integer" if hint is int else "real",))[0].split()
    declared = getattr(hint, "__origin__", hint)
    return Field(name, kind, tuple(axes), type(None) in get_args(declared))


def _arguments(typing_context, at, thread, layout):
    """Within a loop: the tuple of arguments, None where absent, that a table holds by that layout."""
    axes, *words = layout.literal_value.split(" ")
    places = {axis: 2 + place for place, axis in enumerate(axes.split(":"))}
    fields = [(getattr(types, kind), shape) for kind, *shape in (word.split(":") for word in words)]
    rows = [[axis for axis in shape if axis != "*"] for _, shape in fields]
    made = types.Tuple(
        [types.Array(kind, len(row), "C") if row else kind for (kind, _), row in zip(fields, rows, strict=True)]
    )

    def generate(context, builder, signature, given):
        table, own, _ = given
        integer = context.get_value_type(types.int64)

        def word(place):
            return builder.load(builder.gep(table, [integer(place)]))

        values = []
        for place, ((kind, shape), row, result) in enumerate(zip(fields, rows, made, strict=True), 2 + len(places)):
            if not row:
                number = word(place)
                if isinstance(kind, types.Float):
                    number = builder.bitcast(number, ir.DoubleType())
                    number = context.cast(builder, number, types.float64, kind)
                values.append(context.get_dummy_value() if kind is types.none else number)
                continue
            lengths = [word(places[axis]) for axis in row]
            strides = [integer(kind.bitwidth // 8)]
            for length in reversed(lengths):
                strides.insert(0, builder.mul(strides[0], length))
            address = word(place)
            if "*" in shape:
                address = builder.add(address, builder.mul(builder.sext(own, integer), strides[0]))
            array = make_array(result)(context, builder)
            data = builder.inttoptr(address, context.get_data_type(kind).as_pointer())
            populate_array(array, data, lengths, strides[1:], kind.bitwidth // 8, None)
            values.append(array._getvalue())
        return context.make_tuple(builder, made, values)

    return made(at, thread, layout), inspect.unwrap(generate)


arguments: Any = intrinsic(prefer_literal=True)(_arguments)

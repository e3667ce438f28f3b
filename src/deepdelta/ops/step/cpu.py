"""The fused step on the CPU: numba's loops over torch's memory, the tokens shared out among torch's own threads.

N tokens, V value channels, D width, G gates, R numbers of a gating. The table of a loop: N, V, D, G, R, the bits of
offset and eps, the power, and then the addresses of tensors in the order in which the loop takes them.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from deepdelta.ops.step import cpu_kernel
from deepdelta.ops.step.reference import Gating, Normalise
from deepdelta.ops.team import Loop, address, array_at, compiled, kinds, loop, part, run, threads


def forward(
    state: Tensor,
    h: Tensor,
    gating: Gating | None,
    write: Tensor,
    erase: Tensor | None,
    normalise: Normalise,
    opening: Sequence[Tensor | None],
    norm_eps: float,
    filled: Sequence[Tensor | None],
) -> None:
    """Fill new, c, scale, read, inverse, coefficient and, with gating, beta and write.

    Args:
        opening: the compression and the weight of the norm.
    """
    *filled, beta = filled
    numbers = None if gating is None else gating.numbers
    tensors = (state, h, numbers, beta, write, erase, *opening, *filled)
    share = _forward(_Parts.of(state, gating, erase, normalise, opening, filled[1]))
    run(share, _table(state, gating, erase, normalise, norm_eps, tensors), _team(state))


def backward(
    state: Tensor,
    h: Tensor,
    gating: Gating | None,
    write: Tensor,
    erase: Tensor | None,
    normalise: Normalise,
    opening: Sequence[Tensor | None],
    known: Sequence[Tensor | None],
    incoming: Sequence[Tensor | None],
    filled: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Fill the gradients of state, h, the numbers of the gating, write and erase.

    Args:
        opening: the compression and the weight of the norm, where the step opened.
        known: scale, read, inverse, coefficient and beta of the forward pass.
        incoming: the gradients of new and c.

    Returns:
        The gradients of compression and norm weight; None where there is none.
    """
    team = _team(state)
    # Every thread sums up its own share.
    sums = [None if p is None else p.new_zeros(team, *p.shape) for p in opening]
    *known, beta = known
    numbers = None if gating is None else gating.numbers
    tensors = (state, h, numbers, beta, write, erase, *opening, *known, *incoming, *filled, *sums)
    share = _backward(_Parts.of(state, gating, erase, normalise, opening, incoming[1]))
    run(share, _table(state, gating, erase, normalise, 0.0, tensors), team)
    return [None if total is None else total.sum(0) for total in sums]


def replay(state: Tensor, h: Tensor, coefficient: Tensor, new: Tensor) -> None:
    """Fill X + h a^T: X' again, bit for bit, from the a that the forward pass stored."""
    table = _table(state, None, None, Normalise(None, 0), 0.0, (state, h, coefficient, new))
    run(_replay(*kinds(state.dtype)), table, _team(state))


def _team(state: Tensor) -> int:
    return max(1, min(threads(), state.shape[0]))


def _table(
    state: Tensor,
    gating: Gating | None,
    erase: Tensor | None,
    normalise: Normalise,
    norm_eps: float,
    tensors: Sequence[Tensor | None],
) -> list[int]:
    gates = gating.gates if gating is not None else 0 if erase is None else erase.shape[1]
    numbers = 0 if gating is None else gating.numbers.shape[1]
    bits = np.array([normalise.offset or 0.0, norm_eps]).view(np.int64)
    return [*state.shape, gates, numbers, *bits.tolist(), normalise.power, *map(address, tensors)]


class _Parts(NamedTuple):
    """What a loop is compiled for: the kinds of numbers, None for those of parts that are absent."""

    stored: Any
    wide: Any
    gating: Any
    erase: Any
    offset: Any
    compression: Any
    weight: Any
    opened: Any

    @classmethod
    def of(
        cls,
        state: Tensor,
        gating: Gating | None,
        erase: Tensor | None,
        normalise: Normalise,
        opening: Sequence[Tensor | None],
        opened: Tensor | None,
    ) -> "_Parts":
        stored, wide = kinds(state.dtype)
        parts = (gating, erase, normalise.offset, *opening)
        return cls._make(
            (stored, wide, *(p if p is None else wide for p in parts), opened if opened is None else stored)
        )


@compiled
def _number(bits, wide):
    return None if wide is None else wide(np.int64(bits).view(np.float64))


@cache
def _forward(parts: _Parts) -> Loop:
    stored, wide, gating, erase, offset, compression, weight, opened = parts

    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            N, V, D, G, R = at[0], at[1], at[2], at[3], at[4]
            cpu_kernel.forward(
                N * index // count, N * (index + 1) // count, wide(1),
                array_at(at[8], (N, V, D), stored), array_at(at[9], (N, D), stored), array_at(at[10], (N, R), gating),
                array_at(at[11], (N, G), gating), array_at(at[12], (N, V), wide), array_at(at[13], (N, G), erase),
                _number(at[5], offset), at[7], array_at(at[14], (V, D), compression), array_at(at[15], (D,), weight),
                _number(at[6], wide), array_at(at[16], (N, V, D), stored), array_at(at[17], (N, D), opened),
                array_at(at[18], (N,), wide), array_at(at[19], (N, V), erase), array_at(at[20], (N,), wide),
                array_at(at[21], (N, V), wide),
            )  # fmt: skip

        return share

    return loop(make, cpu_kernel)


@cache
def _backward(parts: _Parts) -> Loop:
    stored, wide, gating, erase, offset, compression, weight, opened = parts
    size = np.dtype(wide).itemsize

    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            N, V, D, G, R = at[0], at[1], at[2], at[3], at[4]
            mine = index * D * size
            cpu_kernel.backward(
                N * index // count, N * (index + 1) // count, wide(1),
                array_at(at[8], (N, V, D), stored), array_at(at[9], (N, D), stored), array_at(at[10], (N, R), gating),
                array_at(at[11], (N, G), gating), array_at(at[12], (N, V), wide), array_at(at[13], (N, G), erase),
                _number(at[5], offset), at[7], array_at(at[14], (V, D), compression), array_at(at[15], (D,), weight),
                array_at(at[16], (N,), wide), array_at(at[17], (N, V), erase), array_at(at[18], (N,), wide),
                array_at(at[19], (N, V), wide), array_at(at[20], (N, V, D), stored), array_at(at[21], (N, D), opened),
                array_at(at[22], (N, V, D), stored), array_at(at[23], (N, D), stored), array_at(at[24], (N, R), gating),
                array_at(at[25], (N, V), wide), array_at(at[26], (N, G), erase),
                array_at(at[27] + mine * V, (V, D), compression), array_at(at[28] + mine, (D,), weight),
            )  # fmt: skip

        return share

    return loop(make, cpu_kernel)


@cache
def _replay(stored: Any, wide: Any) -> Loop:
    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            N, V, D = at[0], at[1], at[2]
            cpu_kernel.replay(
                N * index // count, N * (index + 1) // count, array_at(at[8], (N, V, D), stored),
                array_at(at[9], (N, D), stored), array_at(at[10], (N, V), wide), array_at(at[11], (N, V, D), stored),
            )  # fmt: skip

        return share

    return loop(make, cpu_kernel)

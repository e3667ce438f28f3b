"""The loops of the convolutions over tokens, compiled by numba: a token's inputs and gradients are read from the cache.

Shapes: B batch, T tokens, V value channels, D width, K taps; P and Q the channels of x and y, one of them 1, the other
V, so that channel i + o of the weight joins channel i of x and o of y. Table: B, T, P, Q, D, K, then addresses.
"""

from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from deepdelta.ops.team import Loop, address, array_at, compiled, kinds, load, loop, part, run, store, threads


def forward(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Fill y (B, T, Q, D) from x (B, T, P, D) and weight (V, K, D)."""
    run(_forward(*kinds(x.dtype)), [*_sizes(x, weight, y), *map(address, (x, weight, y))], _team(x))


def backward(x: Tensor, weight: Tensor, d_y: Tensor, d_x: Tensor) -> Tensor:
    """Fill d_x; the gradient of the weight is returned, to which every thread adds up a part of its own."""
    team = _team(x)
    sums = weight.new_zeros(team, *weight.shape)
    run(_backward(*kinds(x.dtype)), [*_sizes(x, weight, d_y), *map(address, (x, weight, d_y, d_x, sums))], team)
    return sums.sum(0)


def _team(x: Tensor) -> int:
    return max(1, min(threads(), x.shape[0] * x.shape[1]))


def _sizes(x: Tensor, weight: Tensor, y: Tensor) -> tuple[int, ...]:
    batch, tokens, inputs, width = x.shape
    return batch, tokens, inputs, y.shape[2], width, weight.shape[1]


@compiled
def _convolve(first, last, one, x, weight, y):
    tokens, inputs, width = x.shape[1:]
    outputs, taps = y.shape[2], weight.shape[1]
    total = np.empty(width, weight.dtype)
    for n in range(first, last):
        b, t = n // tokens, n % tokens
        for o in range(outputs):
            for d in range(width):
                total[d] = one - one
            for k in range(max(0, taps - 1 - t), taps):
                for i in range(inputs):
                    for d in range(width):
                        total[d] += weight[i + o, k, d] * load(x[b, t - taps + 1 + k, i, d])
            for d in range(width):
                y[b, t, o, d] = store(total[d], y[b, t, o, d])


@compiled
def _pull(first, last, one, x, weight, d_y, d_x, d_weight):
    """Token t was read, through tap k, by token t + K - 1 - k of the same text."""
    tokens, inputs, width = x.shape[1:]
    outputs, taps = d_y.shape[2], weight.shape[1]
    total = np.empty(width, weight.dtype)
    for n in range(first, last):
        b, t = n // tokens, n % tokens
        for i in range(inputs):
            for d in range(width):
                total[d] = one - one
            for k in range(max(0, taps + t - tokens), taps):
                for o in range(outputs):
                    for d in range(width):
                        g = load(d_y[b, t + taps - 1 - k, o, d])
                        total[d] += weight[i + o, k, d] * g
                        d_weight[i + o, k, d] += g * load(x[b, t, i, d])
            for d in range(width):
                d_x[b, t, i, d] = store(total[d], d_x[b, t, i, d])


@cache
def _forward(stored: Any, wide: Any) -> Loop:
    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            B, T, P, Q, D, K = at[0], at[1], at[2], at[3], at[4], at[5]
            _convolve(
                B * T * index // count, B * T * (index + 1) // count, wide(1), array_at(at[6], (B, T, P, D), stored),
                array_at(at[7], (P + Q - 1, K, D), wide), array_at(at[8], (B, T, Q, D), stored),
            )  # fmt: skip

        return share

    return loop(make)


@cache
def _backward(stored: Any, wide: Any) -> Loop:
    size = np.dtype(wide).itemsize

    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            B, T, P, Q, D, K = at[0], at[1], at[2], at[3], at[4], at[5]
            V = P + Q - 1
            _pull(
                B * T * index // count, B * T * (index + 1) // count, wide(1), array_at(at[6], (B, T, P, D), stored),
                array_at(at[7], (V, K, D), wide), array_at(at[8], (B, T, Q, D), stored),
                array_at(at[9], (B, T, P, D), stored), array_at(at[10] + index * V * K * D * size, (V, K, D), wide),
            )  # fmt: skip

        return share

    return loop(make)

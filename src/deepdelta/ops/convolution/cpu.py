"""The loops of the convolutions over tokens, compiled by numba: a token's inputs and gradients are read from the cache.

Shapes: B batch, T tokens, V value channels, D width, K taps. Table: B, T, V, D, K, then addresses.
"""

from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from deepdelta.ops.team import Loop, address, array_at, compiled, kinds, load, loop, part, run, store, threads


def expand(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Fill y (B, T, V, D) from x (B, T, D) and weight (V, K, D)."""
    run(_expansion(*kinds(x.dtype)), _table(x, weight, x, weight, y), _team(x))


def expand_backward(x: Tensor, weight: Tensor, d_y: Tensor, d_x: Tensor) -> Tensor:
    """Fill d_x; the gradient of the weight is returned."""
    return _gradients(_expansion_backward(*kinds(x.dtype)), x, x, weight, d_y, d_x)


def compress(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Fill y (B, T, D) from x (B, T, V, D) and weight (V, K, D)."""
    run(_compression(*kinds(x.dtype)), _table(y, weight, x, weight, y), _team(y))


def compress_backward(x: Tensor, weight: Tensor, d_y: Tensor, d_x: Tensor) -> Tensor:
    """Fill d_x; the gradient of the weight is returned."""
    return _gradients(_compression_backward(*kinds(x.dtype)), d_y, x, weight, d_y, d_x)


def _gradients(backward: Loop, vectors: Tensor, x: Tensor, weight: Tensor, d_y: Tensor, d_x: Tensor) -> Tensor:
    """Every thread adds up a gradient of the weight of its own; `vectors` is which of x and d_y is (B, T, D)."""
    team = _team(vectors)
    sums = weight.new_zeros(team, *weight.shape)
    run(backward, _table(vectors, weight, x, weight, d_y, d_x, sums), team)
    return sums.sum(0)


def _team(x: Tensor) -> int:
    return max(1, min(threads(), x.shape[0] * x.shape[1]))


def _table(vectors: Tensor, weight: Tensor, *tensors: Tensor) -> list[int]:
    (batch, tokens, width), (channels, taps, _) = vectors.shape, weight.shape
    return [batch, tokens, channels, width, taps, *map(address, tensors)]


@compiled
def _expand(first, last, one, x, weight, y):
    tokens, width = x.shape[1:]
    channels, taps = weight.shape[:2]
    total = np.empty(width, weight.dtype)
    for n in range(first, last):
        b, t = n // tokens, n % tokens
        for j in range(channels):
            for d in range(width):
                total[d] = one - one
            for k in range(max(0, taps - 1 - t), taps):
                for d in range(width):
                    total[d] += weight[j, k, d] * load(x[b, t - taps + 1 + k, d])
            for d in range(width):
                y[b, t, j, d] = store(total[d], y[b, t, j, d])


@compiled
def _pull(first, last, one, x, weight, d_y, d_x, d_weight):
    """Token t was read, through tap k, by token t + K - 1 - k of the same text."""
    tokens, width = x.shape[1:]
    channels, taps = weight.shape[:2]
    total = np.empty(width, weight.dtype)
    for n in range(first, last):
        b, t = n // tokens, n % tokens
        for d in range(width):
            total[d] = one - one
        for j in range(channels):
            for k in range(max(0, taps + t - tokens), taps):
                for d in range(width):
                    g = load(d_y[b, t + taps - 1 - k, j, d])
                    total[d] += weight[j, k, d] * g
                    d_weight[j, k, d] += g * load(x[b, t, d])
        for d in range(width):
            d_x[b, t, d] = store(total[d], d_x[b, t, d])


@compiled
def _compress(first, last, one, x, weight, y):
    tokens, width = y.shape[1:]
    channels, taps = weight.shape[:2]
    total = np.empty(width, weight.dtype)
    for n in range(first, last):
        b, t = n // tokens, n % tokens
        for d in range(width):
            total[d] = one - one
        for k in range(max(0, taps - 1 - t), taps):
            for j in range(channels):
                for d in range(width):
                    total[d] += weight[j, k, d] * load(x[b, t - taps + 1 + k, j, d])
        for d in range(width):
            y[b, t, d] = store(total[d], y[b, t, d])


@compiled
def _spread(first, last, one, x, weight, d_y, d_x, d_weight):
    """Token t was read, through tap k, by token t + K - 1 - k of the same text."""
    tokens, width = d_y.shape[1:]
    channels, taps = weight.shape[:2]
    total = np.empty(width, weight.dtype)
    for n in range(first, last):
        b, t = n // tokens, n % tokens
        for j in range(channels):
            for d in range(width):
                total[d] = one - one
            for k in range(max(0, taps + t - tokens), taps):
                for d in range(width):
                    g = load(d_y[b, t + taps - 1 - k, d])
                    total[d] += weight[j, k, d] * g
                    d_weight[j, k, d] += g * load(x[b, t, j, d])
            for d in range(width):
                d_x[b, t, j, d] = store(total[d], d_x[b, t, j, d])


@cache
def _expansion(stored: Any, wide: Any) -> Loop:
    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            B, T, V, D, K = at[0], at[1], at[2], at[3], at[4]
            _expand(
                B * T * index // count, B * T * (index + 1) // count, wide(1), array_at(at[5], (B, T, D), stored),
                array_at(at[6], (V, K, D), wide), array_at(at[7], (B, T, V, D), stored),
            )  # fmt: skip

        return share

    return loop(make)


@cache
def _expansion_backward(stored: Any, wide: Any) -> Loop:
    size = np.dtype(wide).itemsize

    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            B, T, V, D, K = at[0], at[1], at[2], at[3], at[4]
            _pull(
                B * T * index // count, B * T * (index + 1) // count, wide(1), array_at(at[5], (B, T, D), stored),
                array_at(at[6], (V, K, D), wide), array_at(at[7], (B, T, V, D), stored),
                array_at(at[8], (B, T, D), stored), array_at(at[9] + index * V * K * D * size, (V, K, D), wide),
            )  # fmt: skip

        return share

    return loop(make)


@cache
def _compression(stored: Any, wide: Any) -> Loop:
    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            B, T, V, D, K = at[0], at[1], at[2], at[3], at[4]
            _compress(
                B * T * index // count, B * T * (index + 1) // count, wide(1), array_at(at[5], (B, T, V, D), stored),
                array_at(at[6], (V, K, D), wide), array_at(at[7], (B, T, D), stored),
            )  # fmt: skip

        return share

    return loop(make)


@cache
def _compression_backward(stored: Any, wide: Any) -> Loop:
    size = np.dtype(wide).itemsize

    def make(team: int | None) -> Any:
        def share(at):
            index, count = part(team)
            B, T, V, D, K = at[0], at[1], at[2], at[3], at[4]
            _spread(
                B * T * index // count, B * T * (index + 1) // count, wide(1), array_at(at[5], (B, T, V, D), stored),
                array_at(at[6], (V, K, D), wide), array_at(at[7], (B, T, D), stored),
                array_at(at[8], (B, T, V, D), stored), array_at(at[9] + index * V * K * D * size, (V, K, D), wide),
            )  # fmt: skip

        return share

    return loop(make)

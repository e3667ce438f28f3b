"""The loops of the convolutions over tokens, compiled by numba: a token's inputs and gradients are read from the cache.

Shapes: B batch, T tokens, V value channels, D width, K taps; P and Q the channels of x and y, one of them 1, the other
V, so that channel i + o of the weight joins channel i of x and o of y.
"""

from typing import Annotated, NamedTuple

import numpy as np
from torch import Tensor

from deepdelta.ops.backends.cpu.numbers import load, store
from deepdelta.ops.backends.cpu.records import Kernel, team_of
from deepdelta.ops.backends.cpu.team import compiled


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


class Convolved(NamedTuple):
    x: Annotated[Tensor, "stored B T P D"]
    weight: Annotated[Tensor, "wide V K D"]
    y: Annotated[Tensor, "stored B T Q D"]


class Pulled(NamedTuple):
    x: Annotated[Tensor, "stored B T P D"]
    weight: Annotated[Tensor, "wide V K D"]
    d_y: Annotated[Tensor, "stored B T Q D"]
    d_x: Annotated[Tensor, "stored B T P D"]
    d_weight: Annotated[Tensor, "wide * V K D"]


_forward = Kernel(_convolve, "B T", Convolved)
_backward = Kernel(_pull, "B T", Pulled)


def forward(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Fill y (B, T, Q, D) from x (B, T, P, D) and weight (V, K, D)."""
    _forward(Convolved(x=x, weight=weight, y=y))


def backward(x: Tensor, weight: Tensor, d_y: Tensor, d_x: Tensor) -> Tensor:
    """Fill d_x; the gradient of the weight is returned, to which every thread adds up a part of its own."""
    sums = weight.new_zeros(team_of(x.shape[0] * x.shape[1], x.numel()), *weight.shape)
    _backward(Pulled(x=x, weight=weight, d_y=d_y, d_x=d_x, d_weight=sums))
    return sums.sum(0)

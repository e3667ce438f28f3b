"""The loops of the fused step, compiled by numba: one token at a time, whose vectors stay in the cache.

Forward reads X and h and writes X' and c'; backward reads X, h and the two gradients once. Sums run in `one`'s type
(fp32, or fp64 for an fp64 state); bf16 comes as the 16 bits it is. Arguments that are None leave their part out: numba
compiles a version without it. Shapes: N tokens, V value channels, D width, G gates.
"""

import inspect
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

# Reassociation is what lets a sum use vector registers; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz", "afn"}


def load(value):
    """The number that a stored value stands for."""


def store(value, like):
    """The value to store in an array whose elements are as `like`: rounded to nearest, ties to even."""


def _widened(value):
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def _rounded(value, like):
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    half = np.uint32(32767) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + half) >> np.uint32(16))


# The plain functions, without the checks that the tests put around every function of the package.
load, store = inspect.unwrap(load), inspect.unwrap(store)


@overload(load, inline="always")
def _load(value):
    return inspect.unwrap(_widened) if value == types.uint16 else lambda value: value


@overload(store, inline="always")
def _store(value, like):
    return inspect.unwrap(_rounded) if like == types.uint16 else lambda value, like: value


def _compiled(function: Any) -> Any:
    return numba.njit(nogil=True, fastmath=FAST, cache=True, error_model="numpy")(inspect.unwrap(function))


@_compiled
def forward(
    first,
    last,
    one,
    state,
    h,
    write,
    erase,
    offset,
    power,
    compression,
    weight,
    eps,
    new,
    c,
    scale,
    read,
    inverse,
    coefficient,
):
    """Tokens first .. last - 1: fill new (X'), scale and read; where c is given, c and inverse (1 / rms) too."""
    channels, width = state.shape[1:]
    zero = one - one
    x_in = np.empty(width, scale.dtype)
    for n in range(first, last):
        s = one
        if offset is not None:
            square = zero
            for d in range(width):
                square += load(h[n, d]) * load(h[n, d])
            s = one / np.sqrt(square + offset)
        scale[n] = s
        if c is not None:
            for d in range(width):
                x_in[d] = zero
        for j in range(channels):
            a = write[n, j]
            if power == 1:
                a *= s
            elif power == 2:
                a *= s * s
            if erase is not None:
                along = zero
                for d in range(width):
                    along += load(state[n, j, d]) * load(h[n, d])
                read[n, j] = along
                a -= erase[n, j if erase.shape[1] > 1 else 0] * s * s * along
            coefficient[n, j] = a
            for d in range(width):
                stored = store(load(state[n, j, d]) + a * load(h[n, d]), new[n, j, d])
                new[n, j, d] = stored
                if c is not None:
                    if compression is None:
                        x_in[d] = load(stored)
                    else:
                        x_in[d] += compression[j, d] * load(stored)
        if c is not None:
            r = one
            if weight is not None:
                square = zero
                for d in range(width):
                    square += x_in[d] * x_in[d]
                r = one / np.sqrt(square / (one * width) + eps)
                inverse[n] = r
            for d in range(width):
                if weight is None:
                    c[n, d] = store(x_in[d], c[n, d])
                else:
                    c[n, d] = store(x_in[d] * r * weight[d], c[n, d])


@_compiled
def backward(
    first,
    last,
    one,
    state,
    h,
    write,
    erase,
    offset,
    power,
    compression,
    weight,
    scale,
    read,
    inverse,
    coefficient,
    d_new,
    d_c,
    d_state,
    d_h,
    d_write,
    d_erase,
    d_compression,
    d_weight,
):
    """Tokens first .. last - 1 of the gradients; those of compression and weight are added to what is there."""
    channels, width = state.shape[1:]
    zero = one - one
    grad = np.empty((channels, width), scale.dtype)  # of X', then of X
    after = np.empty((channels, width), scale.dtype)  # X', as it was stored
    x_in = np.empty(width, scale.dtype)
    d_in = np.empty(width, scale.dtype)
    d_vector = np.empty(width, scale.dtype)
    for n in range(first, last):
        s = scale[n]
        lift = s if power == 1 else (s * s if power == 2 else one)
        for d in range(width):
            d_vector[d] = zero
        if d_c is not None:
            for j in range(channels):
                a = coefficient[n, j]
                for d in range(width):
                    after[j, d] = load(store(load(state[n, j, d]) + a * load(h[n, d]), state[n, j, d]))
            if compression is None:
                for d in range(width):
                    x_in[d] = after[0, d]
            else:
                for d in range(width):
                    x_in[d] = zero
                for j in range(channels):
                    for d in range(width):
                        x_in[d] += compression[j, d] * after[j, d]
            if weight is None:
                for d in range(width):
                    d_in[d] = load(d_c[n, d])
            else:
                r, dot = inverse[n], zero
                for d in range(width):
                    unit = x_in[d] * r
                    d_weight[d] += load(d_c[n, d]) * unit
                    d_in[d] = load(d_c[n, d]) * weight[d]
                    dot += d_in[d] * unit
                dot /= one * width
                for d in range(width):
                    d_in[d] = r * (d_in[d] - x_in[d] * r * dot)
        d_scale = zero
        for j in range(channels):
            b = along = zero
            if erase is not None:
                b = erase[n, j if erase.shape[1] > 1 else 0]
                along = read[n, j]
            a = coefficient[n, j]
            d_a = zero
            for d in range(width):
                g = load(d_new[n, j, d])
                if d_c is not None:
                    if compression is None:
                        g += d_in[d]
                    else:
                        g += compression[j, d] * d_in[d]
                        d_compression[j, d] += d_in[d] * after[j, d]
                grad[j, d] = g
                d_a += g * load(h[n, d])
            d_write[n, j] = d_a * lift
            d_read = zero
            if erase is not None:
                d_read = -d_a * b * s * s
                gate = j if erase.shape[1] > 1 else 0
                d_b = -d_a * s * s * along
                if gate == j:
                    d_erase[n, gate] = d_b
                else:
                    d_erase[n, gate] += d_b
                d_scale -= d_a * b * (s + s) * along
            if power == 1:
                d_scale += d_a * write[n, j]
            elif power == 2:
                d_scale += d_a * write[n, j] * (s + s)
            for d in range(width):
                d_vector[d] += a * grad[j, d] + d_read * load(state[n, j, d])
                d_state[n, j, d] = store(grad[j, d] + d_read * load(h[n, d]), d_state[n, j, d])
        # s = (|h|^2 + offset)^(-1/2), so ds/dh = -s^3 h.
        pull = zero if offset is None else d_scale * s * s * s
        for d in range(width):
            d_h[n, d] = store(d_vector[d] - pull * load(h[n, d]), d_h[n, d])


@_compiled
def replay(first, last, state, h, coefficient, new):
    """X' again from X and the a that the forward stored, by the forward's own multiplication and addition."""
    channels, width = state.shape[1:]
    for n in range(first, last):
        for j in range(channels):
            a = coefficient[n, j]
            for d in range(width):
                new[n, j, d] = store(load(state[n, j, d]) + a * load(h[n, d]), new[n, j, d])


@_compiled
def decode(
    one,
    state,
    h,
    c,
    gate,
    gate_bias,
    target,
    offset,
    power,
    compression,
    weight,
    eps,
    write,
    erase,
    new,
    c_new,
    scale,
    read,
    inverse,
    coefficient,
):
    """`forward` for every token of arrays of any leading axes, w and b computed here too: b = 2 sigmoid(gate c + bias)
    and w = b (target c); without a target w is 0, without a gate 1 and b is not used. `erase` None leaves b out."""
    tokens, channels = write.shape
    width = c.shape[-1]
    state_NVD, new_NVD = state.reshape((tokens, channels, width)), new.reshape((tokens, channels, width))
    h_ND, c_ND = h.reshape((tokens, width)), c.reshape((tokens, width))
    zero = one - one
    for n in range(tokens):
        if gate is None:
            for j in range(channels):
                write[n, j] = one
        else:
            for j in range(channels):
                if j < gate.shape[0]:
                    logit = gate_bias[j]
                    for d in range(width):
                        logit += gate[j, d] * c_ND[n, d]
                    b = (one + one) / (one + np.exp(-logit))
                    if erase is not None:
                        erase[n, j] = b
                w = zero
                if target is not None:
                    for d in range(width):
                        w += target[j, d] * c_ND[n, d]
                write[n, j] = b * w
    c_new_ND = None if c_new is None else c_new.reshape((tokens, width))
    forward(
        0, tokens, one, state_NVD, h_ND, write, erase, offset, power, compression, weight, eps, new_NVD, c_new_ND,
        scale, read, inverse, coefficient,
    )  # fmt: skip

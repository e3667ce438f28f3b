"""The loops of the fused step, compiled by numba: one token at a time, whose vectors stay in the cache.

Forward reads X and h and writes X' and c'; backward reads X, h and the two gradients once. Sums run in `one`'s type
(fp32, or fp64 for an fp64 state); bf16 and fp16 come as the 16 bits they are. Arguments that are None leave their part
out: numba compiles a version without it. Shapes: N tokens, V value channels, D width, G gates.

While a channel is worked on, its row of the next token is fetched: a token's passes over what is in the cache leave the
memory idle, and the processor's own prefetching, which follows what is read, idles with it.

A loop that sums stores nothing: around a store the compiler keeps a second version of the loop, for arrays that
overlap; its test is conservative, and the order of the sum, so the last bit, would depend on where memory lies.
"""

from functools import partial

import numpy as np

from deepdelta.ops.backends.cpu.numbers import fetch, load, store
from deepdelta.ops.backends.cpu.team import compiled

LINE = 64
"""Bytes of a line of the cache: of every processor that numba knows at most so many bytes are one."""


@compiled
def fetch_next(x, n, j, last, written):
    """Have row j of the next token's x come, one of this share's tokens; `written` is True or False as it stands."""
    if n + 1 < last:
        for d in range(0, x.shape[2], LINE // x.itemsize):
            fetch(x, (n + 1, j, d), written)


@compiled
def forward(
    first, last, one,
    state, h, gating, share, factor, beta, write, erase, offset, power, compression, norm_weight, norm_eps,
    new, c, scale, read, inverse, coefficient,
):  # fmt: skip
    """Tokens first .. last - 1: fill new (X'), scale and read; where c is given, c and inverse (1 / rms) too.

    Given gating, fill beta and write from it (see `reference.Gating`); `erase` is then beta, or None.
    """
    channels, width = state.shape[1:]
    zero = one - one
    x_in = np.empty(width, scale.dtype)
    for n in range(first, last):
        if gating is not None:
            gates = beta.shape[1]
            for g in range(gates):
                beta[n, g] = (one + one) / (one + np.exp(-gating[n, g]))
                if factor is not None:
                    beta[n, g] *= factor[0]
            for j in range(channels):
                v = gating[n, gates + j] if gating.shape[1] > gates else zero
                if share is None:
                    write[n, j] = beta[n, j if gates > 1 else 0] * v
                else:
                    write[n, j] = one + share * v
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
            fetch_next(state, n, j, last, False)
            fetch_next(new, n, j, last, True)
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
            if norm_weight is not None:
                square = zero
                for d in range(width):
                    square += x_in[d] * x_in[d]
                r = one / np.sqrt(square / (one * width) + norm_eps)
                inverse[n] = r
            for d in range(width):
                if norm_weight is None:
                    c[n, d] = store(x_in[d], c[n, d])
                else:
                    c[n, d] = store(x_in[d] * r * norm_weight[d], c[n, d])


@compiled
def backward(
    first, last, one,
    state, h, gating, share, factor, beta, write, erase, offset, power, compression, norm_weight,
    scale, read, inverse, coefficient, d_new, d_c,
    d_state, d_h, d_gating, d_factor, d_write, d_erase, d_compression, d_norm_weight,
):  # fmt: skip
    """Tokens first .. last - 1 of the gradients; those of parameters are added to what is there."""
    channels, width = state.shape[1:]
    zero = one - one
    grad = np.empty(width, scale.dtype)  # of one channel of X'
    x_in = np.empty(width, scale.dtype)
    d_in = np.empty(width, scale.dtype)
    d_vector = np.empty(width, scale.dtype)
    for n in range(first, last):
        s = scale[n]
        lift = s if power == 1 else (s * s if power == 2 else one)
        for d in range(width):
            d_vector[d] = zero
        if d_c is not None:
            for d in range(width):
                x_in[d] = zero
            for j in range(channels):
                a = coefficient[n, j]
                for d in range(width):
                    after = load(store(load(state[n, j, d]) + a * load(h[n, d]), state[n, j, d]))
                    x_in[d] += after if compression is None else compression[j, d] * after
            if norm_weight is None:
                for d in range(width):
                    d_in[d] = load(d_c[n, d])
            else:
                r, dot = inverse[n], zero
                for d in range(width):
                    d_in[d] = load(d_c[n, d]) * norm_weight[d]
                for d in range(width):
                    dot += d_in[d] * x_in[d] * r
                for d in range(width):
                    d_norm_weight[d] += load(d_c[n, d]) * x_in[d] * r
                dot /= one * width
                for d in range(width):
                    d_in[d] = r * (d_in[d] - x_in[d] * r * dot)
        d_scale = zero
        for j in range(channels):
            b = along = zero
            if erase is not None:
                b = erase[n, j if erase.shape[1] > 1 else 0]
                along = read[n, j]
            fetch_next(state, n, j, last, False)
            fetch_next(d_new, n, j, last, False)
            fetch_next(d_state, n, j, last, True)
            a = coefficient[n, j]
            d_a = zero
            if d_c is None:
                for d in range(width):
                    grad[d] = load(d_new[n, j, d])
            elif compression is None:
                for d in range(width):
                    grad[d] = load(d_new[n, j, d]) + d_in[d]
            else:
                for d in range(width):
                    grad[d] = load(d_new[n, j, d]) + compression[j, d] * d_in[d]
                for d in range(width):
                    after = load(store(load(state[n, j, d]) + a * load(h[n, d]), state[n, j, d]))
                    d_compression[j, d] += d_in[d] * after
            for d in range(width):
                d_a += grad[d] * load(h[n, d])
            d_write[n, j] = d_a * lift
            d_read = zero
            if erase is not None:
                d_read = -d_a * b * s * s
                own = j if erase.shape[1] > 1 else 0
                d_b = -d_a * s * s * along
                if own == j:
                    d_erase[n, own] = d_b
                else:
                    d_erase[n, own] += d_b
                d_scale -= d_a * b * (s + s) * along
            if power == 1:
                d_scale += d_a * write[n, j]
            elif power == 2:
                d_scale += d_a * write[n, j] * (s + s)
            for d in range(width):
                d_vector[d] += a * grad[d] + d_read * load(state[n, j, d])
            for d in range(width):
                d_state[n, j, d] = store(grad[d] + d_read * load(h[n, d]), d_state[n, j, d])
        # s = (|h|^2 + offset)^(-1/2), so ds/dh = -s^3 h.
        pull = zero if offset is None else d_scale * s * s * s
        for d in range(width):
            d_h[n, d] = store(d_vector[d] - pull * load(h[n, d]), d_h[n, d])
        if gating is not None:
            gates = beta.shape[1]
            for g in range(gates):
                d_gating[n, g] = d_erase[n, g] if erase is not None else zero
            if gating.shape[1] > gates:
                for j in range(channels):
                    own = j if gates > 1 else 0
                    if share is None:
                        d_gating[n, own] += d_write[n, j] * gating[n, gates + j]
                        d_gating[n, gates + j] = d_write[n, j] * beta[n, own]
                    else:
                        d_gating[n, gates + j] = share * d_write[n, j]
            for g in range(gates):
                gate = (one + one) / (one + np.exp(-gating[n, g]))  # beta without its factor, which may be 0
                if factor is not None:
                    d_factor[0] += d_gating[n, g] * gate
                    d_gating[n, g] *= factor[0]
                d_gating[n, g] *= gate * (one - gate / (one + one))


@compiled
def replay(first, last, one, state, h, coefficient, new):
    """X' again from X and the a that the forward stored, by the forward's own multiplication and addition."""
    channels, width = state.shape[1:]
    for n in range(first, last):
        for j in range(channels):
            fetch_next(state, n, j, last, False)
            fetch_next(new, n, j, last, True)
            a = coefficient[n, j]
            for d in range(width):
                new[n, j, d] = store(load(state[n, j, d]) + a * load(h[n, d]), new[n, j, d])


@partial(compiled, kept=True)
def decode(
    one, c_now, weights, bias,
    state, h, gating, share, factor, beta, write, erase, offset, power, compression, norm_weight, norm_eps,
    new, c, scale, read, inverse, coefficient,
):  # fmt: skip
    """`forward` for every token, with gating = weights c_now + bias; `weights` None leaves `write` as it is."""
    tokens, width = h.shape
    if weights is not None:
        for n in range(tokens):
            for i in range(weights.shape[0]):
                number = bias[i]
                for d in range(width):
                    number += weights[i, d] * c_now[n, d]
                gating[n, i] = number
    forward(
        0, tokens, one,
        state, h, gating, share, factor, beta, write, erase, offset, power, compression, norm_weight, norm_eps,
        new, c, scale, read, inverse, coefficient,
    )  # fmt: skip

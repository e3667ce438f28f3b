"""The kernels of the fused step in Triton: a program takes one token (forward) or a run of tokens (backward).

A pass over a token goes through its width in tiles of (BLOCK_V, BLOCK_D). Where one tile holds the whole token the
loops have one trip each, the compiler merges their loads, and X, h and the two gradients leave memory once; otherwise
later passes find them in the cache. A token's loads stand before its stores, for a store between them would keep the
compiler from merging.

Sums run in the type of `write` (fp32, or fp64 for an fp64 state). Arguments that are None leave their part out. The
operations that decide X' are written as fma, so that every kernel rounds them alike and X' comes back bit for bit.
Shapes: N tokens, V value channels, D width, G gates (1, or V).
"""

import inspect
from typing import Any

import triton
import triton.language as tl


def _compiled(function: Any) -> Any:
    # The plain function, without the checks that the tests put around every function of the package. The number of
    # tokens is never specialised: another batch or length compiles nothing.
    name = "tokens"
    plain = inspect.unwrap(function)
    return triton.jit(plain, do_not_specialize=[name] if name in inspect.signature(plain).parameters else [])


@_compiled
def _known(write, erase, n, s, POWER: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of token n: w, w's factor s^power, and b (0 without an erase term)."""
    v = tl.arange(0, BLOCK_V)
    w_V = tl.load(write + n * V + v, mask=v < V, other=0)
    lift = tl.full((), 1, w_V.dtype)
    if POWER == 1:
        lift = s
    if POWER == 2:
        lift = s * s
    b_V = tl.zeros_like(w_V)
    if erase is not None:
        b_V = tl.load(erase + n * GATES + (v if GATES > 1 else v * 0), mask=v < V, other=0)
    return w_V, lift, b_V


@_compiled
def _coefficient(w_V, lift, b_V, s, along_V):
    """a of X' = X + a h^T: s^power w - s^2 b (h^T X)."""
    return tl.fma(-b_V * s * s, along_V, w_V * lift)


@_compiled
def _token(
    state,
    h,
    n,
    start,
    wide: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of token n: its columns, its places in (V, D), which of them exist, X and h."""
    v = tl.arange(0, BLOCK_V)
    d = start + tl.arange(0, BLOCK_D)
    place_VD = v[:, None] * D + d[None, :]
    real_VD = (v[:, None] < V) & (d[None, :] < D)
    x_VD = tl.load(state + n * (V * D) + place_VD, mask=real_VD, other=0).to(wide)
    h_D = tl.load(h + n * D + d, mask=d < D, other=0).to(wide)
    return d, place_VD, real_VD, x_VD, h_D


@_compiled
def _rewritten(x_VD, h_D, a_V, compression, place_VD, real_VD, stored: tl.constexpr):
    """X' as it is stored, and x_in = sum_j C_j X'_j of what was stored (without C, the one value channel)."""
    new_VD = tl.fma(a_V[:, None], h_D[None, :], x_VD).to(stored)
    after_VD = new_VD.to(x_VD.dtype)
    if compression is not None:
        x_in_D = tl.sum(tl.load(compression + place_VD, mask=real_VD, other=0) * after_VD, 0)
    else:
        x_in_D = tl.sum(after_VD, 0)
    return new_VD, after_VD, x_in_D


@_compiled
def forward(
    state,
    h,
    write,
    erase,
    compression,
    weight,
    new,
    c,
    scale,
    read,
    inverse,
    OFFSET: tl.constexpr,
    POWER: tl.constexpr,
    EPS: tl.constexpr,
    REPLAY: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token per program: fill new (X'), scale and read; where c is given, c and inverse (1 / rms) too.

    In a REPLAY scale and read are known, and only new is filled.
    """
    n = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    wide: tl.constexpr = write.dtype.element_ty
    stored: tl.constexpr = new.dtype.element_ty
    s = tl.full((), 1, wide)
    along_V = tl.zeros((BLOCK_V,), wide)
    if REPLAY:
        s = tl.load(scale + n)
        if erase is not None:
            along_V = tl.load(read + n * V + v, mask=v < V, other=0)
    else:
        square = tl.full((), 0, wide)
        for start in range(0, D, BLOCK_D):
            _, _, _, x_VD, h_D = _token(state, h, n, start, wide, V, D, BLOCK_V, BLOCK_D)
            square += tl.sum(h_D * h_D, 0)
            along_V += tl.sum(x_VD * h_D[None, :], 1)
        if OFFSET is not None:
            s = 1 / tl.sqrt(square + OFFSET)
    w_V, lift, b_V = _known(write, erase, n, s, POWER, V, GATES, BLOCK_V)
    a_V = _coefficient(w_V, lift, b_V, s, along_V) if erase is not None else w_V * lift

    r = tl.full((), 1, wide)
    if weight is not None:
        square_in = tl.full((), 0, wide)
        for start in range(0, D, BLOCK_D):
            _, place_VD, real_VD, x_VD, h_D = _token(state, h, n, start, wide, V, D, BLOCK_V, BLOCK_D)
            _, _, x_in_D = _rewritten(x_VD, h_D, a_V, compression, place_VD, real_VD, stored)
            square_in += tl.sum(x_in_D * x_in_D, 0)
        r = 1 / tl.sqrt(square_in / D + EPS)

    for start in range(0, D, BLOCK_D):
        d, place_VD, real_VD, x_VD, h_D = _token(state, h, n, start, wide, V, D, BLOCK_V, BLOCK_D)
        new_VD, _, x_in_D = _rewritten(x_VD, h_D, a_V, compression, place_VD, real_VD, stored)
        if weight is not None:
            x_in_D = x_in_D * r * tl.load(weight + d, mask=d < D, other=0)
        tl.store(new + n * (V * D) + place_VD, new_VD, mask=real_VD)
        if c is not None:
            tl.store(c + n * D + d, x_in_D, mask=d < D)
    if not REPLAY:
        tl.store(scale + n, s)
        if erase is not None:
            tl.store(read + n * V + v, along_V, mask=v < V)
        if weight is not None:
            tl.store(inverse + n, r)


@_compiled
def _incoming(
    x_VD,
    h_D,
    a_V,
    r,
    dot,
    n,
    d,
    place_VD,
    real_VD,
    compression,
    weight,
    d_new,
    d_c,
    V: tl.constexpr,
    D: tl.constexpr,
):
    """On a tile: the gradient of X' from both of its readers; X' as stored, and the gradients of x_in and weight."""
    wide: tl.constexpr = x_VD.dtype
    stored: tl.constexpr = d_new.dtype.element_ty
    grad_VD = tl.load(d_new + n * (V * D) + place_VD, mask=real_VD, other=0).to(wide)
    _, after_VD, x_in_D = _rewritten(x_VD, h_D, a_V, compression, place_VD, real_VD, stored)
    d_in_D = tl.zeros_like(h_D)
    d_weight_D = tl.zeros_like(h_D)
    if d_c is not None:
        d_in_D = tl.load(d_c + n * D + d, mask=d < D, other=0).to(wide)
        if weight is not None:
            d_weight_D = d_in_D * x_in_D * r
            d_in_D = r * (d_in_D * tl.load(weight + d, mask=d < D, other=0) - x_in_D * r * dot)
        if compression is not None:
            grad_VD += tl.load(compression + place_VD, mask=real_VD, other=0) * d_in_D[None, :]
        else:
            grad_VD += d_in_D[None, :]
    return grad_VD, after_VD, d_in_D, d_weight_D


@_compiled
def backward(
    state,
    h,
    write,
    erase,
    compression,
    weight,
    scale,
    read,
    inverse,
    d_new,
    d_c,
    d_state,
    d_h,
    d_write,
    d_erase,
    d_compression,
    d_weight,
    tokens,
    OFFSET: tl.constexpr,
    POWER: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One run of tokens per program, and in its row of d_compression and d_weight the sum over that run."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    begin = program * tokens // programs
    v = tl.arange(0, BLOCK_V)
    wide: tl.constexpr = write.dtype.element_ty
    stored: tl.constexpr = state.dtype.element_ty
    whole: tl.constexpr = BLOCK_D >= D
    # Sums over tokens: in registers where a tile is the whole width, else in the program's own row in memory.
    sum_VD = tl.zeros((BLOCK_V, BLOCK_D), wide)
    sum_D = tl.zeros((BLOCK_D,), wide)
    for n in range(begin, (program + 1) * tokens // programs):
        s = tl.load(scale + n)
        w_V, lift, b_V = _known(write, erase, n, s, POWER, V, GATES, BLOCK_V)
        along_V = tl.zeros((BLOCK_V,), wide)
        a_V = w_V * lift
        if erase is not None:
            along_V = tl.load(read + n * V + v, mask=v < V, other=0)
            a_V = _coefficient(w_V, lift, b_V, s, along_V)

        r = tl.full((), 1, wide)
        dot = tl.full((), 0, wide)
        if weight is not None:
            r = tl.load(inverse + n)
            for start in range(0, D, BLOCK_D):
                d, place_VD, real_VD, x_VD, h_D = _token(state, h, n, start, wide, V, D, BLOCK_V, BLOCK_D)
                _, _, x_in_D = _rewritten(x_VD, h_D, a_V, compression, place_VD, real_VD, stored)
                d_c_D = tl.load(d_c + n * D + d, mask=d < D, other=0).to(wide)
                dot += tl.sum(d_c_D * tl.load(weight + d, mask=d < D, other=0) * x_in_D, 0)
            dot = dot * r / D

        d_a_V = tl.zeros((BLOCK_V,), wide)
        for start in range(0, D, BLOCK_D):
            d, place_VD, real_VD, x_VD, h_D = _token(state, h, n, start, wide, V, D, BLOCK_V, BLOCK_D)
            grad_VD, _, _, _ = _incoming(
                x_VD, h_D, a_V, r, dot, n, d, place_VD, real_VD, compression, weight, d_new, d_c, V, D
            )
            d_a_V += tl.sum(grad_VD * h_D[None, :], 1)
        d_read_V = -d_a_V * b_V * s * s
        pull = tl.full((), 0, wide)  # of h along k = s h, from s = (|h|^2 + offset)^(-1/2): ds/dh = -s^2 k
        if OFFSET is not None:
            d_s_V = -d_a_V * b_V * along_V * (s + s)
            if POWER == 1:
                d_s_V += d_a_V * w_V
            if POWER == 2:
                d_s_V += d_a_V * w_V * (s + s)
            pull = tl.sum(d_s_V, 0) * s * s

        for start in range(0, D, BLOCK_D):
            d, place_VD, real_VD, x_VD, h_D = _token(state, h, n, start, wide, V, D, BLOCK_V, BLOCK_D)
            grad_VD, after_VD, d_in_D, d_weight_D = _incoming(
                x_VD, h_D, a_V, r, dot, n, d, place_VD, real_VD, compression, weight, d_new, d_c, V, D
            )
            d_h_D = tl.sum(a_V[:, None] * grad_VD + d_read_V[:, None] * x_VD, 0) - pull * (s * h_D)
            if whole:
                sum_VD += d_in_D[None, :] * after_VD
                sum_D += d_weight_D
            else:
                earlier = n > begin
                if compression is not None:
                    row_VD = d_compression + program * (V * D) + place_VD
                    sum_VD = tl.load(row_VD, mask=real_VD & earlier, other=0) + d_in_D[None, :] * after_VD
                    tl.store(row_VD, sum_VD, mask=real_VD)
                if weight is not None:
                    row_D = d_weight + program * D + d
                    sum_D = tl.load(row_D, mask=(d < D) & earlier, other=0) + d_weight_D
                    tl.store(row_D, sum_D, mask=d < D)
            tl.store(d_state + n * (V * D) + place_VD, grad_VD + d_read_V[:, None] * h_D[None, :], mask=real_VD)
            tl.store(d_h + n * D + d, d_h_D, mask=d < D)
        tl.store(d_write + n * V + v, d_a_V * lift, mask=v < V)
        if erase is not None:
            d_b_V = -d_a_V * along_V * s * s
            if GATES > 1:
                tl.store(d_erase + n * V + v, d_b_V, mask=v < V)
            else:
                tl.store(d_erase + n, tl.sum(d_b_V, 0))
        if not whole:
            # The next token may have other threads read what was stored here.
            tl.debug_barrier()

    if whole:
        d = tl.arange(0, BLOCK_D)
        if compression is not None:
            place_VD = v[:, None] * D + d[None, :]
            row_VD = d_compression + program * (V * D) + place_VD
            tl.store(row_VD, sum_VD, mask=(v[:, None] < V) & (d[None, :] < D))
        if weight is not None:
            tl.store(d_weight + program * D + d, sum_D, mask=d < D)

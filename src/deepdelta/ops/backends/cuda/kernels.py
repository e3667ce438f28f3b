"""The kernels of the fused step in Triton: a program takes one token (forward) or a run of tokens (backward).

A pass over a token goes through its width in tiles of (BLOCK_V, BLOCK_D). Where one tile holds the whole token the
loops have one trip each, the compiler merges their loads, and X, h and the two gradients leave memory once; otherwise
later passes find them in the cache. A token's loads stand before its stores, for a store between two equal loads would
keep them from being merged.

Sums run in the type of `write` (fp32, or fp64 for an fp64 state). Arguments that are None leave their part out. What
decides X' = X + h a^T from a is one fma per number, so that every kernel rounds alike and X' comes back bit for bit.
Nothing is added up by atomics: shapes and device fix who sums what, and in which order.
Shapes: N tokens, V value channels, D width, G gates (1, or V).
"""

import inspect
from typing import Any

import triton
import triton.language as tl


def _compiled(function: Any) -> Any:
    # The plain function, without the checks that the tests put around every function of the package. `tokens` is not
    # specialised: another batch or length compiles nothing.
    return triton.jit(inspect.unwrap(function), do_not_specialize=["tokens"])


@_compiled
def _of_token(values, n, V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Row n of (N, V), or of (N, 1) for all value channels alike."""
    v = tl.arange(0, BLOCK_V)
    return tl.load(values + n * COLUMNS + (v if COLUMNS > 1 else v * 0), mask=v < V, other=0)


@_compiled
def _gating(gating, n, V: tl.constexpr, GATES: tl.constexpr, TARGETS: tl.constexpr, BLOCK_V: tl.constexpr):
    """2 sigmoid of the gate's numbers and the target v of token n, of (N, G) or (N, G + V); v is 0 without one."""
    row = gating + n * (GATES + TARGETS)
    v_V = tl.zeros((BLOCK_V,), gating.dtype.element_ty)
    if TARGETS > 0:
        v_V = _of_token(row + GATES, 0, V, V, BLOCK_V)
    return 2 / (1 + tl.exp(-_of_token(row, 0, V, GATES, BLOCK_V))), v_V


@_compiled
def _lift(s, POWER: tl.constexpr):
    """s^power."""
    lift = s * s
    if POWER == 1:
        lift = s
    if POWER == 0:
        lift = tl.full((), 1, s.dtype)
    return lift


@_compiled
def _tile(start, V: tl.constexpr, D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile's columns, its places in (V, D), and which of them exist."""
    v = tl.arange(0, BLOCK_V)
    d = start + tl.arange(0, BLOCK_D)
    return d, v[:, None] * D + d[None, :], (v[:, None] < V) & (d[None, :] < D)


@_compiled
def _token(state, h, n, d, place_VD, real_VD, wide: tl.constexpr, V: tl.constexpr, D: tl.constexpr):
    """X and h of token n on a tile."""
    x_VD = tl.load(state + n * (V * D) + place_VD, mask=real_VD, other=0).to(wide)
    h_D = tl.load(h + n * D + d, mask=d < D, other=0).to(wide)
    return x_VD, h_D


@_compiled
def _opening(compression, norm_weight, d, place_VD, real_VD, wide: tl.constexpr, D: tl.constexpr):
    """C and the norm's weight on a tile; ones without a compression, which then has one value channel to take."""
    c_VD = tl.full(place_VD.shape, 1, wide)
    if compression is not None:
        c_VD = tl.load(compression + place_VD, mask=real_VD, other=0)
    weight_D = tl.full(d.shape, 1, wide)
    if norm_weight is not None:
        weight_D = tl.load(norm_weight + d, mask=d < D, other=0)
    return c_VD, weight_D


@_compiled
def _rewritten(x_VD, h_D, a_V, stored: tl.constexpr):
    """X' as it is stored."""
    return tl.fma(a_V[:, None], h_D[None, :], x_VD).to(stored)


@_compiled
def forward(
    state, h, gating, factor, beta, write, erase, compression, norm_weight, new, c, scale, read, inverse, coefficient,
    OFFSET: tl.constexpr, POWER: tl.constexpr, EPS: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
    GATES: tl.constexpr, TARGETS: tl.constexpr, SHARE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token per program: fill new (X'), scale, read and coefficient (a); c and inverse (1 / rms) where asked.

    Given gating, fill beta and write from it (see `reference.Gating`); `erase` is then beta, or None.
    """
    n = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    wide: tl.constexpr = write.dtype.element_ty
    stored: tl.constexpr = new.dtype.element_ty
    square = tl.full((), 0, wide)
    along_V = tl.zeros((BLOCK_V,), wide)
    for start in range(0, D, BLOCK_D):
        d, place_VD, real_VD = _tile(start, V, D, BLOCK_V, BLOCK_D)
        x_VD, h_D = _token(state, h, n, d, place_VD, real_VD, wide, V, D)
        square += tl.sum(h_D * h_D, 0)
        along_V += tl.sum(x_VD * h_D[None, :], 1)
    s = tl.full((), 1, wide)
    if OFFSET is not None:
        s = 1 / tl.sqrt(square + OFFSET)
    if gating is None:
        w_V = _of_token(write, n, V, V, BLOCK_V)
        b_V = _of_token(erase, n, V, GATES, BLOCK_V) if erase is not None else w_V
    else:
        b_V, target_V = _gating(gating, n, V, GATES, TARGETS, BLOCK_V)
        if factor is not None:
            b_V *= tl.load(factor)
        w_V = b_V * target_V if SHARE is None else 1 + SHARE * target_V
    a_V = w_V * _lift(s, POWER)
    if erase is not None:
        a_V -= b_V * s * s * along_V

    r = tl.full((), 1, wide)
    if norm_weight is not None:
        square = tl.full((), 0, wide)
        for start in range(0, D, BLOCK_D):
            d, place_VD, real_VD = _tile(start, V, D, BLOCK_V, BLOCK_D)
            x_VD, h_D = _token(state, h, n, d, place_VD, real_VD, wide, V, D)
            c_VD, weight_D = _opening(compression, norm_weight, d, place_VD, real_VD, wide, D)
            x_in_D = tl.sum(c_VD * _rewritten(x_VD, h_D, a_V, stored).to(wide), 0)
            square += tl.sum(x_in_D * x_in_D, 0)
        r = 1 / tl.sqrt(square / D + EPS)

    for start in range(0, D, BLOCK_D):
        d, place_VD, real_VD = _tile(start, V, D, BLOCK_V, BLOCK_D)
        x_VD, h_D = _token(state, h, n, d, place_VD, real_VD, wide, V, D)
        new_VD = _rewritten(x_VD, h_D, a_V, stored)
        if c is not None:
            c_VD, weight_D = _opening(compression, norm_weight, d, place_VD, real_VD, wide, D)
            tl.store(c + n * D + d, tl.sum(c_VD * new_VD.to(wide), 0) * r * weight_D, mask=d < D)
        tl.store(new + n * (V * D) + place_VD, new_VD, mask=real_VD)
    if gating is not None:
        tl.store(beta + n * GATES + v, b_V, mask=v < GATES)
        tl.store(write + n * V + v, w_V, mask=v < V)
    tl.store(scale + n, s)
    tl.store(coefficient + n * V + v, a_V, mask=v < V)
    if erase is not None:
        tl.store(read + n * V + v, along_V, mask=v < V)
    if norm_weight is not None:
        tl.store(inverse + n, r)


@_compiled
def replay(state, h, coefficient, new, V: tl.constexpr, D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """X' again from X and a; one token per program."""
    n = tl.program_id(0).to(tl.int64)
    a_V = _of_token(coefficient, n, V, V, BLOCK_V)
    for start in range(0, D, BLOCK_D):
        d, place_VD, real_VD = _tile(start, V, D, BLOCK_V, BLOCK_D)
        x_VD, h_D = _token(state, h, n, d, place_VD, real_VD, coefficient.dtype.element_ty, V, D)
        tl.store(new + n * (V * D) + place_VD, _rewritten(x_VD, h_D, a_V, new.dtype.element_ty), mask=real_VD)


@_compiled
def _gradients(
    state, h, d_new, d_c, n, a_V, r, c_VD, weight_D, d, place_VD, real_VD,
    wide: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """On a tile of token n: X, h, X' as stored, x_in, and the gradients of X', x_in and the weight.

    Those of X' and x_in lack what the norm takes back: r^2 mean(d_x_in x_in) x_in.
    """
    grad_VD = tl.load(d_new + n * (V * D) + place_VD, mask=real_VD, other=0).to(wide)
    d_in_D = tl.zeros(d.shape, wide)
    if d_c is not None:
        d_in_D = tl.load(d_c + n * D + d, mask=d < D, other=0).to(wide) * r
    x_VD, h_D = _token(state, h, n, d, place_VD, real_VD, wide, V, D)
    after_VD = _rewritten(x_VD, h_D, a_V, state.dtype.element_ty).to(wide)
    x_in_D = tl.sum(c_VD * after_VD, 0)
    d_weight_D = d_in_D * x_in_D
    d_in_D = d_in_D * weight_D
    if d_c is not None:
        grad_VD += c_VD * d_in_D[None, :]
    return x_VD, h_D, after_VD, x_in_D, grad_VD, d_in_D, d_weight_D


@_compiled
def _over_gates(each_V, GATES: tl.constexpr):
    """The sum over the value channels where these have one gate."""
    return each_V if GATES > 1 else tl.zeros_like(each_V) + tl.sum(each_V, 0)


@_compiled
def backward(
    state, h, gating, factor, write, erase, compression, norm_weight, scale, read, inverse, coefficient, d_new, d_c,
    d_state, d_h, d_gating, d_factor, d_write, d_erase, d_compression, d_norm_weight, tokens,
    OFFSET: tl.constexpr, POWER: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
    GATES: tl.constexpr, TARGETS: tl.constexpr, SHARE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One run of tokens per program, and in its row of the gradients of parameters the sum over that run.

    Given gating, its gradient takes the place of those of write and erase.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    first = program * tokens // programs
    last = (program + 1) * tokens // programs
    v = tl.arange(0, BLOCK_V)
    sums_at = program * D
    wide: tl.constexpr = write.dtype.element_ty
    whole: tl.constexpr = BLOCK_D >= D
    # Where a tile is the whole token, parameters and the sums of their gradients stay in registers; else the sums grow
    # in the program's row in memory.
    sum_VD = tl.zeros((BLOCK_V, BLOCK_D), wide)
    sum_D = tl.zeros((BLOCK_D,), wide)
    sum_factor = tl.full((), 0, wide)
    if whole:
        d, place_VD, real_VD = _tile(0, V, D, BLOCK_V, BLOCK_D)
        c_VD, weight_D = _opening(compression, norm_weight, d, place_VD, real_VD, wide, D)
    # Two stages: the next token's vectors are on their way while this one is computed.
    for n in tl.range(first, last, num_stages=2):
        s = tl.load(scale + n)
        r = tl.load(inverse + n) if norm_weight is not None else tl.full((), 1, wide)
        a_V = _of_token(coefficient, n, V, V, BLOCK_V)
        b_V = tl.zeros_like(a_V)
        along_V = tl.zeros_like(a_V)
        if erase is not None:
            b_V = _of_token(erase, n, V, GATES, BLOCK_V)
            along_V = _of_token(read, n, V, V, BLOCK_V)

        # The gradient of a is linear in that of x_in: both parts are summed before `back` is known, in one pass.
        back = tl.full((), 0, wide)
        d_a_V = tl.zeros((BLOCK_V,), wide)
        less_V = tl.zeros((BLOCK_V,), wide)
        for start in range(0, D, BLOCK_D):
            if not whole:
                d, place_VD, real_VD = _tile(start, V, D, BLOCK_V, BLOCK_D)
                c_VD, weight_D = _opening(compression, norm_weight, d, place_VD, real_VD, wide, D)
            x_VD, h_D, after_VD, x_in_D, grad_VD, d_in_D, d_weight_D = _gradients(
                state, h, d_new, d_c, n, a_V, r, c_VD, weight_D, d, place_VD, real_VD, wide, V, D
            )
            d_a_V += tl.sum(grad_VD * h_D[None, :], 1)
            if norm_weight is not None:
                less_V += tl.sum(c_VD * (h_D * x_in_D)[None, :], 1)
                back += tl.sum(d_in_D * x_in_D, 0)
        if norm_weight is not None:
            back = back * r * r / D
            d_a_V = d_a_V - back * less_V
        d_read_V = -d_a_V * b_V * s * s
        pull = tl.full((), 0, wide)
        if OFFSET is not None:
            d_s_V = -d_a_V * b_V * along_V * (s + s)
            if POWER > 0:
                d_s_V += d_a_V * _of_token(write, n, V, V, BLOCK_V) * (1 if POWER == 1 else s + s)
            # s = (|h|^2 + offset)^(-1/2), so ds/dh = -s^2 (s h); s^3 by itself could leave the range.
            pull = tl.sum(d_s_V, 0) * s * s

        for start in range(0, D, BLOCK_D):
            if not whole:
                d, place_VD, real_VD = _tile(start, V, D, BLOCK_V, BLOCK_D)
                c_VD, weight_D = _opening(compression, norm_weight, d, place_VD, real_VD, wide, D)
            x_VD, h_D, after_VD, x_in_D, grad_VD, d_in_D, d_weight_D = _gradients(
                state, h, d_new, d_c, n, a_V, r, c_VD, weight_D, d, place_VD, real_VD, wide, V, D
            )
            if norm_weight is not None:
                d_in_D -= back * x_in_D
                grad_VD -= c_VD * (back * x_in_D)[None, :]
            d_h_D = tl.sum(a_V[:, None] * grad_VD + d_read_V[:, None] * x_VD, 0) - pull * (s * h_D)
            if compression is not None:
                if not whole:
                    sum_VD = tl.load(d_compression + sums_at * V + place_VD, mask=real_VD & (n > first), other=0)
                sum_VD += d_in_D[None, :] * after_VD
                if not whole:
                    tl.store(d_compression + sums_at * V + place_VD, sum_VD, mask=real_VD)
            if norm_weight is not None:
                if not whole:
                    sum_D = tl.load(d_norm_weight + sums_at + d, mask=(d < D) & (n > first), other=0)
                sum_D += d_weight_D
                if not whole:
                    tl.store(d_norm_weight + sums_at + d, sum_D, mask=d < D)
            tl.store(d_state + n * (V * D) + place_VD, grad_VD + d_read_V[:, None] * h_D[None, :], mask=real_VD)
            tl.store(d_h + n * D + d, d_h_D, mask=d < D)
        d_w_V = d_a_V * _lift(s, POWER)
        d_b_V = -d_a_V * along_V * s * s  # 0 without an erase
        if gating is None:
            tl.store(d_write + n * V + v, d_w_V, mask=v < V)
            if erase is not None:
                tl.store(d_erase + n * GATES + v, _over_gates(d_b_V, GATES), mask=v < GATES)
        else:
            gate_V, target_V = _gating(gating, n, V, GATES, TARGETS, BLOCK_V)
            d_gate_V = _over_gates(d_b_V + d_w_V * target_V if SHARE is None else d_b_V, GATES)
            beta_V = gate_V
            if factor is not None:
                sum_factor += tl.sum(tl.where(v < GATES, d_gate_V * gate_V, 0), 0)
                d_gate_V *= tl.load(factor)
                beta_V *= tl.load(factor)
            row = d_gating + n * (GATES + TARGETS)
            tl.store(row + v, d_gate_V * gate_V * (1 - gate_V / 2), mask=v < GATES)
            tl.store(row + GATES + v, d_w_V * beta_V if SHARE is None else SHARE * d_w_V, mask=v < TARGETS)
        if not whole:
            tl.debug_barrier()  # the next token's sums may be read by other threads than wrote these

    if whole:
        if compression is not None:
            tl.store(d_compression + sums_at * V + place_VD, sum_VD, mask=real_VD)
        if norm_weight is not None:
            tl.store(d_norm_weight + sums_at + d, sum_D, mask=d < D)
    if factor is not None:
        tl.store(d_factor + program, sum_factor)

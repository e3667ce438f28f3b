"""The fused step as an operator that torch.compile and autograd know: numba on the CPU, Triton on CUDA."""

import importlib
import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.ops.convolution import compress_tokens
from deepdelta.ops.derivatives import check_plain, once
from deepdelta.ops.precision import accumulation_dtype
from deepdelta.ops.step.reference import Gating, Normalise

NEEDS = {"cpu": "numba", "cuda": "triton"}
"""The package whose compiler the fused step needs, by device."""

DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What a state may be stored in."""

MAKE_COEFFICIENTS = ("cpu",)
"""Devices whose kernels make write and erase of a gating; elsewhere PyTorch does, before the kernel."""


def fused_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused step cannot run there, or None where it can."""
    package = NEEDS.get(device.type)
    if package is None:
        return f"there is no fused step for device '{device.type}'"
    if importlib.util.find_spec(package) is None:
        return f"the fused step on {device.type} needs the package {package}, which is not installed"
    if dtype not in DTYPES:
        return f"the fused step has {', '.join(DTYPES.values())}, not {dtype}"
    if package == "numba":
        from deepdelta.ops.kept import keeping_problem  # not above: it imports numba

        # One of each folder whose loops are kept.
        return keeping_problem(fused_step) or keeping_problem(compress_tokens)
    return None


class Done(NamedTuple):
    """What a step needs to be done again, without derivatives: X' = X + h a^T, tokens as one axis."""

    h: Tensor
    coefficient: Tensor
    """a, (N, V)."""


class FusedStep(NamedTuple):
    state: Tensor
    """X', (..., V, D)."""
    c: Tensor | None
    """c', (..., D)."""
    done: Done


def fused_step(
    state: Tensor,
    h: Tensor,
    write: Tensor | float,
    erase: Tensor | None,
    normalise: Normalise,
    compression: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    opens: bool = False,
    gating: Gating | None = None,
) -> FusedStep:
    """X' and c' as `reference.rewrite_step` gives them, in one pass over the state; c' is None unless `opens`.

    Args:
        state: X (..., V, D); h (..., D), taken to the dtype of the state.
        write, erase: w (..., V) and b (..., 1) or (..., V), taken to the precision of sums (fp32, or fp64 for an fp64
            state). A number as `write` goes along h as it is, as in `rewrite_along`.
        compression, norm_weight: C (V, D) and the weight (D) of the following norm, same precision.
        gating: the numbers that write and erase come from, instead of these; some kernels make them in their pass.

    Raises:
        UserError: the device or dtype has no fused step, with the reason, raised when the operator runs; or more than
            first derivatives are asked for.
    """
    given = (state, h, write, erase, compression, norm_weight, None if gating is None else gating.numbers)
    check_plain(*(tensor for tensor in given if isinstance(tensor, Tensor)))
    *batch, channels, width = state.shape
    wide = accumulation_dtype(state.dtype)
    if gating is not None and state.device.type not in MAKE_COEFFICIENTS:
        (write, erase), gating = gating.coefficients(), None
    if gating is None and isinstance(write, float):
        write = torch.full((*batch, channels), write, dtype=wide, device=state.device)
        normalise = normalise._replace(power=0)
    if normalise.offset is None:
        assert gating is None and isinstance(write, Tensor), "a constant scale goes into the coefficients"
        write = write * normalise.constant**normalise.power
        erase = None if erase is None else erase * normalise.constant**2
        normalise = Normalise(None, 0)
    compression, norm_weight = (
        None if parameter is None or not opens else parameter.to(wide).contiguous()
        for parameter in (compression, norm_weight)
    )
    h_ND = h.to(state.dtype).reshape(-1, width).contiguous()
    numbers, write_NV, erase_NG = (
        tensor.to(wide).reshape(-1, tensor.shape[-1]).contiguous() if isinstance(tensor, Tensor) else None
        for tensor in ((None, write, erase) if gating is None else (gating.numbers, None, None))
    )
    new, c, *_, coefficient = step(
        state.reshape(-1, channels, width).contiguous(),
        h_ND,
        numbers,
        0 if gating is None else gating.gates,
        gating is not None and gating.erases,
        write_NV,
        erase_NG,
        normalise.offset,
        normalise.power,
        compression,
        norm_weight,
        norm_eps,
        opens,
    )
    return FusedStep(
        new.view(state.shape), c.view(h.shape) if opens else None, Done(h_ND.detach(), coefficient.detach())
    )


@torch.no_grad()
def remake(done: Done, state: Tensor, *, backwards: bool = False) -> Tensor:
    """X' from X without a second look at the gate: bit for bit as `fused_step` made it.

    `backwards` goes from X' to X = X' - h a^T, which is exact but for rounding.
    """
    flat = state.reshape(-1, *state.shape[-2:]).contiguous()
    coefficient = -done.coefficient if backwards else done.coefficient
    new = torch.empty_like(flat)
    _implementation(state).replay(flat, done.h, coefficient, new)
    return new.view(state.shape)


def _implementation(state: Tensor) -> Any:
    """The module whose `forward` and `backward` run on the state's device; refused where they cannot."""
    if problem := _known_problem(state.device, state.dtype):
        raise UserError(f"{problem}; use the backend 'reference'.")
    return importlib.import_module(f"deepdelta.ops.step.{state.device.type}")


_known_problem = cache(fused_problem)


def _made(
    state: Tensor, h: Tensor, gating: Tensor | None, gates: int, erases: bool, erase: Tensor | None, opens: bool
) -> tuple[Tensor, ...]:
    """What a step returns, not filled: new, c, scale, read, inverse, beta, write, coefficient; empty where there is
    none. Beta and write are those made of a gating."""
    tokens, channels, _ = state.shape
    wide = accumulation_dtype(state.dtype)
    return (
        torch.empty_like(state),
        torch.empty_like(h) if opens else h.new_empty(0),
        state.new_empty(tokens, dtype=wide),
        state.new_empty((tokens, 0 if erase is None and not erases else channels), dtype=wide),
        state.new_empty(tokens, dtype=wide),
        state.new_empty((tokens, gates), dtype=wide),
        state.new_empty((tokens, 0 if gating is None else channels), dtype=wide),
        state.new_empty((tokens, channels), dtype=wide),
    )


@torch.library.custom_op("deepdelta::step", mutates_args=())
def step(
    state: Tensor,
    h: Tensor,
    gating: Tensor | None,
    gates: int,
    erases: bool,
    write: Tensor | None,
    erase: Tensor | None,
    offset: float | None,
    power: int,
    compression: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    opens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = _made(state, h, gating, gates, erases, erase, opens)
    new, c, scale, read, inverse, beta, made_write, coefficient = made
    if gating is not None:
        write, erase = made_write, beta if erases else None
    _implementation(state).forward(
        state,
        h,
        None if gating is None else Gating(gating, gates, erases),
        write,
        erase,
        Normalise(offset, power),
        (compression, norm_weight) if opens else (None, None),
        norm_eps,
        (new, c if opens else None, scale, read, inverse, coefficient, beta),
    )
    return made  # type: ignore[return-value]


def _gradients_made(*given: Tensor | None) -> list[Tensor | None]:
    """The gradients of these, not filled."""
    return [None if tensor is None else torch.empty_like(tensor) for tensor in given]


@torch.library.custom_op("deepdelta::step_backward", mutates_args=())
def step_backward(
    state: Tensor,
    h: Tensor,
    gating: Tensor | None,
    gates: int,
    erases: bool,
    write: Tensor,
    erase: Tensor | None,
    offset: float | None,
    power: int,
    compression: Tensor | None,
    norm_weight: Tensor | None,
    opens: bool,
    scale: Tensor,
    read: Tensor,
    inverse: Tensor,
    beta: Tensor,
    coefficient: Tensor,
    d_new: Tensor,
    d_c: Tensor,
) -> list[Tensor]:
    made = _gradients_made(state, h, gating, write, erase)
    of_parameters = _implementation(state).backward(
        state,
        h,
        None if gating is None else Gating(gating, gates, erases),
        write,
        erase,
        Normalise(offset, power),
        (compression, norm_weight) if opens else (None, None),
        (scale, read, inverse, coefficient, beta),
        (d_new, d_c if opens else None),
        made,
    )
    return [write.new_empty(0) if gradient is None else gradient for gradient in (*made, *of_parameters)]


@step.register_fake
def _(state, h, gating, gates, erases, write, erase, offset, power, compression, norm_weight, norm_eps, opens):  # type: ignore[no-untyped-def]
    return _made(state, h, gating, gates, erases, erase, opens)


@step_backward.register_fake
def _(state, h, gating, gates, erases, write, erase, offset, power, compression, norm_weight, opens, *_):  # type: ignore[no-untyped-def]
    opening = (compression, norm_weight) if opens else (None, None)
    made = _gradients_made(state, h, gating, write, erase, *opening)
    return [write.new_empty(0) if tensor is None else tensor for tensor in made]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    state, h, gating, gates, erases, write, erase, offset, power, compression, norm_weight, _, opens = inputs
    _, _, scale, read, inverse, beta, made_write, coefficient = output
    if gating is not None:
        write, erase = made_write, beta if erases else None
    ctx.save_for_backward(
        state, h, gating, write, erase, compression, norm_weight, scale, read, inverse, beta, coefficient
    )
    ctx.settings = (gates, erases, offset, power, opens)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx, d_new, d_c, *_):  # type: ignore[no-untyped-def]
    state, h, gating, write, erase, compression, norm_weight, *known = ctx.saved_tensors
    gates, erases, offset, power, opens = ctx.settings
    d_state, d_h, d_gating, d_write, d_erase, d_compression, d_weight = step_backward(
        state, h, gating, gates, erases, write, erase, offset, power, compression, norm_weight, opens,
        *known, d_new.contiguous(), d_c.contiguous(),
    )  # fmt: skip
    gradients = (
        d_state, d_h, d_gating, None, None, d_write, d_erase, None, None, d_compression, d_weight, None, None
    )  # fmt: skip
    # What was not given (with a gating, write and erase) has none.
    return tuple(one if needed else None for one, needed in zip(gradients, ctx.needs_input_grad, strict=True))


step.register_autograd(_gradients, setup_context=_save)
once(step_backward)

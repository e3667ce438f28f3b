"""The fused step as an operator that torch.compile and autograd know: numba on the CPU, Triton on CUDA."""

import importlib
import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.ops.precision import accumulation_dtype
from deepdelta.ops.step.reference import Normalise

NEEDS = {"cpu": "numba", "cuda": "triton"}
"""The package whose compiler the fused step needs, by device."""


def fused_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused step cannot run there, or None where it can."""
    package = NEEDS.get(device.type)
    if package is None:
        return f"there is no fused step for device '{device.type}'"
    if importlib.util.find_spec(package) is None:
        return f"the fused step on {device.type} needs the package {package}, which is not installed"
    if device.type == "cpu" and dtype == torch.float16:
        return "the fused step on the CPU has fp32, fp64 and bf16, not fp16"
    return None


class Done(NamedTuple):
    """What a step needs to be done again: X' = X + h a^T, tokens as one axis."""

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
) -> FusedStep:
    """X' and c' as `reference.rewrite_step` gives them, in one pass over the state; c' is None unless `opens`.

    Args:
        state: X (..., V, D); h (..., D), taken to the dtype of the state.
        write, erase: w (..., V) and b (..., 1) or (..., V), taken to the precision of sums (fp32, or fp64 for an fp64
            state). A number as `write` goes along h as it is, as in `rewrite_along`.
        compression, norm_weight: C (V, D) and the weight (D) of the following norm, same precision.

    Raises:
        UserError: the device or dtype has no fused step, with the reason; raised when the operator runs.
    """
    *batch, channels, width = state.shape
    wide = accumulation_dtype(state.dtype)
    if isinstance(write, float):
        write = torch.full((*batch, channels), write, dtype=wide, device=state.device)
        normalise = normalise._replace(power=0)
    if normalise.offset is None:
        write = write * normalise.constant**normalise.power
        erase = None if erase is None else erase * normalise.constant**2
        normalise = Normalise(None, 0)
    compression, norm_weight = (
        None if parameter is None or not opens else parameter.to(wide).contiguous()
        for parameter in (compression, norm_weight)
    )
    h_ND = h.to(state.dtype).reshape(-1, width).contiguous()
    write_NV = write.to(wide).reshape(-1, channels).contiguous()
    erase_NG = None if erase is None else erase.to(wide).reshape(-1, erase.shape[-1]).contiguous()
    new, c, _, _, _, coefficient = step(
        state.reshape(-1, channels, width).contiguous(),
        h_ND,
        write_NV,
        erase_NG,
        normalise.offset,
        normalise.power,
        compression,
        norm_weight,
        norm_eps,
        opens,
    )
    done = Done(h_ND, coefficient)
    return FusedStep(new.view(state.shape), c.view(h.shape) if opens else None, done)


@torch.no_grad()
def remake(done: Done, state: Tensor, *, backwards: bool = False) -> Tensor:
    """X' from X without a second look at the gate: bit for bit as `fused_step` made it.

    `backwards` goes from X' to X = X' - h a^T, which is exact but for rounding.
    """
    flat = state.reshape(-1, *state.shape[-2:]).contiguous()
    coefficient = -done.coefficient if backwards else done.coefficient
    new: Tensor = _implementation(state).replay(flat, done.h, coefficient)
    return new.view(state.shape)


def _implementation(state: Tensor) -> Any:
    """The module whose `forward` and `backward` run on the state's device; refused where they cannot."""
    if problem := _known_problem(state.device, state.dtype):
        raise UserError(f"{problem}; use the backend 'reference'.")
    return importlib.import_module(f"deepdelta.ops.step.{state.device.type}")


_known_problem = cache(fused_problem)


@torch.library.custom_op("deepdelta::step", mutates_args=())
def step(
    state: Tensor,
    h: Tensor,
    write: Tensor,
    erase: Tensor | None,
    offset: float | None,
    power: int,
    compression: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    opens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    filled: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = _implementation(state).forward(
        state, h, write, erase, Normalise(offset, power), compression, norm_weight, norm_eps, opens
    )
    return filled


@torch.library.custom_op("deepdelta::step_backward", mutates_args=())
def step_backward(
    state: Tensor,
    h: Tensor,
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
    coefficient: Tensor,
    d_new: Tensor,
    d_c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _implementation(state).backward(
        state,
        h,
        write,
        erase,
        Normalise(offset, power),
        compression,
        norm_weight,
        opens,
        scale,
        read,
        inverse,
        coefficient,
        d_new,
        d_c,
    )
    return tuple(write.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


@step.register_fake
def _(state, h, write, erase, offset, power, compression, norm_weight, norm_eps, opens):  # type: ignore[no-untyped-def]
    tokens = state.shape[0]
    return (
        torch.empty_like(state),
        torch.empty_like(h) if opens else h.new_empty(0),
        write.new_empty(tokens),
        torch.empty_like(write) if erase is not None else write.new_empty((0, 0)),
        write.new_empty(tokens),
        torch.empty_like(write),
    )


@step_backward.register_fake
def _(state, h, write, erase, offset, power, compression, norm_weight, opens, *known):  # type: ignore[no-untyped-def]
    given = (state, h, write, erase, compression if opens else None, norm_weight if opens else None)
    return tuple(write.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in given)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    state, h, write, erase, offset, power, compression, norm_weight, _, opens = inputs
    _, _, scale, read, inverse, coefficient = output
    ctx.save_for_backward(state, h, write, erase, compression, norm_weight, scale, read, inverse, coefficient)
    ctx.settings = (offset, power, opens)
    ctx.mark_non_differentiable(scale, read, inverse, coefficient)


def _gradients(ctx, d_new, d_c, *_):  # type: ignore[no-untyped-def]
    state, h, write, erase, compression, norm_weight, scale, read, inverse, coefficient = ctx.saved_tensors
    offset, power, opens = ctx.settings
    d_state, d_h, d_write, d_erase, d_compression, d_weight = step_backward(
        state, h, write, erase, offset, power, compression, norm_weight, opens, scale, read, inverse, coefficient,
        d_new.contiguous(), d_c.contiguous(),
    )  # fmt: skip
    return (
        d_state,
        d_h,
        d_write,
        None if erase is None else d_erase,
        None,
        None,
        None if compression is None else d_compression,
        None if norm_weight is None else d_weight,
        None,
        None,
    )


step.register_autograd(_gradients, setup_context=_save)

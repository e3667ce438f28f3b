"""The fused step as an operator that torch.compile and autograd know: numba on the CPU, Triton on CUDA."""

import importlib
import importlib.util
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.ops.derivatives import check_plain
from deepdelta.ops.operators import differentiable, once, operator
from deepdelta.ops.precision import accumulation_dtype
from deepdelta.ops.step.arguments import (
    SUMMED,
    Given,
    Gradients,
    Incoming,
    Known,
    Made,
    Replayed,
    by_token,
    schema,
)
from deepdelta.ops.step.reference import Gating, Normalise
from deepdelta.releases import check_tested

NEEDS = {"cpu": "numba", "cuda": "triton"}
"""The package whose compiler the fused step needs, by device."""

DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What a state may be stored in."""


def fused_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused step cannot run there, or None where it can."""
    package = NEEDS.get(device.type)
    if package is None:
        return f"there is no fused step for device '{device.type}'"
    if importlib.util.find_spec(package) is None:
        absent = f"{package}, which is not installed (pip install {package})"
        return f"the fused step on {device.type} needs the package {absent}"
    check_tested(package)
    if dtype not in DTYPES:
        return f"the fused step has {', '.join(DTYPES.values())}, not {dtype}"
    if package == "numba":
        from deepdelta.ops.backends.cpu.kept import keeping_problem  # not above: it imports numba

        return keeping_problem()
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
        gating: the numbers that write and erase come from, instead of these; the kernels make them in their pass.

    Raises:
        UserError: the device or dtype has no fused step, with the reason, raised when the operator runs; or more than
            first derivatives are asked for.
    """
    of_gating = () if gating is None else (gating.numbers, gating.factor)
    every = (state, h, write, erase, compression, norm_weight, *of_gating)
    check_plain(*(tensor for tensor in every if isinstance(tensor, Tensor)))
    *batch, channels, width = state.shape
    wide = accumulation_dtype(state.dtype)
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
    numbers, write_NV, erase_NG = (
        tensor.to(wide).contiguous() if isinstance(tensor, Tensor) else None
        for tensor in ((None, write, erase) if gating is None else (gating.numbers, None, None))
    )
    given = Given(
        state=state.contiguous(),
        h=h.to(state.dtype).contiguous(),
        gating=numbers,
        gates=0 if gating is None else gating.gates,
        erases=gating is not None and gating.erases,
        share=None if gating is None else gating.share,
        factor=None if gating is None else gating.factor,
        write=write_NV,
        erase=erase_NG,
        offset=normalise.offset,
        power=normalise.power,
        compression=compression,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        opens=opens,
    )
    made = Made(*step(*given))
    done = Done(given.h.detach().view(-1, width), made.coefficient.detach())
    return FusedStep(made.new, made.c if opens else None, done)


@torch.no_grad()
def remake(done: Done, state: Tensor, *, backwards: bool = False) -> Tensor:
    """X' from X without a second look at the gate: bit for bit as `fused_step` made it.

    `backwards` goes from X' to X = X' - h a^T, which is exact but for rounding.
    """
    flat = state.reshape(-1, *state.shape[-2:]).contiguous()
    coefficient = -done.coefficient if backwards else done.coefficient
    new = torch.empty_like(flat)
    _implementation(state).replay(Replayed(state=flat, h=done.h, coefficient=coefficient, new=new))
    return new.view(state.shape)


def _implementation(state: Tensor) -> Any:
    """The module whose `forward` and `backward` run on the state's device; refused where they cannot."""
    if problem := known_problem(state.device, state.dtype):
        raise UserError(f"{problem}; use the backend 'reference'.")
    return _code(state.device.type)


@cache
def _code(device: str) -> Any:
    return importlib.import_module(f"deepdelta.ops.backends.{device}.launch")


known_problem = cache(fused_problem)
"""The same, asked once a process."""


def _allocated(given: Given) -> Made:
    """What a step fills; empty where there is none. X' and c' have the axes of X and h, the rest the tokens as one."""
    state, h, wide = given.state, given.h, accumulation_dtype(given.state.dtype)
    tokens, channels = prod(state.shape[:-2]), state.shape[-2]
    erases, makes = given.erase is not None or given.erases, given.gating is not None
    return Made(
        new=torch.empty_like(state),
        c=torch.empty_like(h) if given.opens else h.new_empty(0),
        scale=state.new_empty(tokens, dtype=wide),
        read=state.new_empty((tokens, channels if erases else 0), dtype=wide),
        inverse=state.new_empty(tokens, dtype=wide),
        beta=state.new_empty((tokens, given.gates), dtype=wide),
        made_write=state.new_empty((tokens, channels if makes else 0), dtype=wide),
        coefficient=state.new_empty((tokens, channels), dtype=wide),
    )


def _with_coefficients(given: Given, made: Made) -> Given:
    """With the write and the erase that are made of a gating."""
    if given.gating is None:
        return given
    return given._replace(write=made.made_write, erase=made.beta if given.erases else None)


def _step(*values: Any) -> Any:
    made = _allocated(Given(*values))
    given = _with_coefficients(Given(*values), made)
    present = made._replace(
        c=made.c if given.opens else None,
        read=None if given.erase is None else made.read,
        beta=None if given.gating is None else made.beta,
    )
    _implementation(given.state).forward(by_token(given), by_token(present))
    return tuple(made)


def _gradients_allocated(given: Given) -> Gradients:
    """Those of parameters are empty where there is none; kernels bring their own."""
    each = (getattr(given, name.removeprefix("d_")) for name in Gradients._fields)
    return Gradients(*(None if tensor is None else torch.empty_like(tensor) for tensor in each))  # type: ignore[arg-type]


def _all_there(gradients: Gradients) -> list[Tensor]:
    return [gradients.d_write.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _step_backward(*values: Any) -> Any:
    given, known, incoming = _split(values)
    known = known._replace(
        read=None if given.erase is None else known.read, beta=None if given.gating is None else known.beta
    )
    gradients = _gradients_allocated(given)
    records = by_token(given), known, by_token(incoming), by_token(gradients)
    filled = _implementation(given.state).backward(*records)
    return _all_there(gradients._replace(**{name: getattr(filled, name) for name in SUMMED}))


def _split(values: tuple[Any, ...]) -> tuple[Given, Known, Incoming]:
    given, known = len(Given._fields), len(Known._fields)
    return Given(*values[:given]), Known(*values[given : given + known]), Incoming(*values[given + known :])


def _step_fake(*values: Any) -> Any:
    return tuple(_allocated(Given(*values)))


def _backward_fake(*values: Any) -> Any:
    return _all_there(_gradients_allocated(_split(values)[0]))


_operator = operator("step", schema(f"({'Tensor, ' * 7}Tensor)", Given), _step, _step_fake)
_operator_backward = operator(
    "step_backward", schema("Tensor[]", Given, Known, Incoming), _step_backward, _backward_fake
)
step_backward = once(_operator_backward, _step_backward, len(Incoming._fields))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    made = Made(*output)
    known = (getattr(made, name) for name in Known._fields)
    values = (*_with_coefficients(Given(*inputs), made), *known)
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_new: Tensor | None, d_c: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    values = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    # What nothing used has no gradient.
    given = Given(*values[: len(Given._fields)])
    d_new = torch.zeros_like(given.state) if d_new is None else d_new.contiguous()
    if given.opens:
        d_c = torch.zeros_like(given.h) if d_c is None else d_c.contiguous()
    found = step_backward(*values, d_new, d_c)
    # What was not given (with a gating, write and erase) has none.
    each = zip(_PLACES, ctx.needs_input_grad, strict=True)
    return tuple([found[place] if needed else None for place, needed in each])


_PLACES = [Gradients._fields.index(d) if (d := f"d_{name}") in Gradients._fields else -1 for name in Given._fields]
"""Of each argument of a step that can have a gradient, where this is among those that the backward pass gives."""

step = differentiable(_operator, _step, _gradients, _save)

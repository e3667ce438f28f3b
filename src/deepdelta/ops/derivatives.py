"""Fused code has first derivatives, by backward passes; whatever else PyTorch can ask of it is refused here.

Without this, some of that would come out wrong without a word: tangents of 0 under torch.func.jvp.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deepdelta.errors import UserError


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, hessian and so on) is at work."""
    return torch._C._are_functorch_transforms_active()


def check_plain(*tensors: Tensor) -> None:
    """Refuse the inputs of a fused operator under torch.func or with forward-mode tangents.

    Raises:
        UserError: with what to use instead.
    """
    # Outside of a level of dual numbers no tensor has a tangent.
    dual = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if transformed() or (dual and any(map(_has_tangent, tensors))):
        refuse()


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def refuse(*_: Any) -> NoReturn:
    """Raise what the user is told."""
    raise UserError(
        "fused code has first derivatives by backward(), not second ones, forward-mode ones or torch.func transforms "
        '(grad, vmap, jvp, hessian); for these choose use_backend(module, "reference").'
    )

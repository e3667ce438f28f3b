"""Operators that torch.compile and autograd know, with first derivatives and no others.

Not by `torch.library.custom_op`: its first call imports torch's compiler, the larger part of a second, and every call
pays for checks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

from deepdelta.ops.derivatives import refuse

_LIBRARY = Library("deepdelta", "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator `deepdelta::name`, run by `run`; `fake` gives results of the same shapes and dtypes.

    What `run` returns must be new tensors: nothing checks that.
    """
    qualified = f"deepdelta::{name}"
    torch.library.define(qualified, schema, lib=_LIBRARY, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", run, lib=_LIBRARY)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    return getattr(torch.ops.deepdelta, name).default


def differentiable(operator: Any, backward: Callable[..., Any], save: Callable[..., None], once: Any) -> None:
    """Give an operator its backward pass, in which the operator `once` runs, which refuses to be differentiated or
    batched itself."""
    torch.library.register_autograd(operator.name(), backward, setup_context=save, lib=_LIBRARY)
    torch.library.register_autograd(once.name(), refuse, lib=_LIBRARY)
    torch.library.register_vmap(once.name(), refuse, lib=_LIBRARY)
    # The batches of torch.autograd.grad(is_grads_batched=True), which are not torch.func's.
    _LIBRARY.impl(once.name(), refuse, "Batched")  # type: ignore[no-untyped-call]

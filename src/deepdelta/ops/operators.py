"""Operators that torch.compile and autograd know, with first derivatives and no others.

Not by `torch.library.custom_op`: its first call imports torch's compiler, the larger part of a second, and every call
pays for checks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from deepdelta.ops.derivatives import refuse, transformed

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


def watched() -> bool:
    """Whether something must see operators that are called: a compiler, a mode that counts or fakes, a transform."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or transformed()


def once(operator: Any, run: Callable[..., Any], gradients: int) -> Callable[..., Any]:
    """An operator that refuses to be differentiated or batched, as a function: `run` itself where that is the same.

    The dispatcher and the graph take longer than a small step does.

    Args:
        gradients: how many of the last arguments are incoming gradients, which alone may be batched.
    """
    torch.library.register_autograd(operator.name(), refuse, lib=_LIBRARY)
    torch.library.register_vmap(operator.name(), refuse, lib=_LIBRARY)
    # The batches of torch.autograd.grad(is_grads_batched=True), which are not torch.func's.
    _LIBRARY.impl(operator.name(), refuse, "Batched")  # type: ignore[no-untyped-call]

    def call(*values: Any) -> Any:
        # Where gradients are made differentiable, they are enabled in the backward pass.
        through = watched() or torch.is_grad_enabled() or any(map(_batched, values[-gradients:]))
        return operator(*values) if through else run(*values)

    return call


def _batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


def differentiable(
    operator: Any, run: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., None]
) -> Callable[..., Any]:
    """An operator with its backward pass, as a function: by an autograd function of its own where nothing watches."""
    torch.library.register_autograd(operator.name(), backward, setup_context=save, lib=_LIBRARY)

    def forward(ctx: Any, *values: Any) -> Any:
        output = run(*values)
        save(ctx, values, output)
        return output

    # Not by `setup_context`, for which PyTorch looks at the signature in every call.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    direct: Any = type("Fused", (torch.autograd.Function,), methods)

    def call(*values: Any) -> Any:
        return operator(*values) if watched() else direct.apply(*values)

    return call

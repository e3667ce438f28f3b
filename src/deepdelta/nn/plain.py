"""Which modules may be seen through: where a call is the class's own formula, on parameters that lie in the module."""

from typing import TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

Kind = TypeVar("Kind", bound=nn.Module)


def plain(module: nn.Module | None, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """Whether a call of `module` does what its class, one of `kinds`, says and nothing else.

    Only then may its parameters be used in its place, in a pass of another module. Not so with a hook (pruning and the
    old weight norm work by one), a parametrization, a forward or a compiled call of its own, a wrapper or another
    module in its place (LoRA, FSDP), or parameters of another kind (sharded or quantised).
    """
    return (
        module is not None
        and type(module) in kinds
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
        and all(parameter is None or type(parameter) in OWN for parameter in module._parameters.values())
        and ("weight" in module._parameters or "weight" not in module.__dict__)
    )


OWN = (nn.Parameter, Tensor)
"""Types of parameters; torch.func puts tensors in their place."""

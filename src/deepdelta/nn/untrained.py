"""A stream that stands in no module tree has no optimiser: said once, at the first step over its residuals."""

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_unseen: "WeakKeyDictionary[nn.Module, WeakSet[nn.Module]]" = WeakKeyDictionary()
"""Streams whose residuals no optimiser has stepped over yet, and these residuals."""
_hooks: list[Any] = []


def watch(stream: nn.Module, residual: nn.Module) -> None:
    """Look at the first optimiser step over a residual that this stream made."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))
    _unseen.setdefault(stream, WeakSet()).add(residual)


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _unseen:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

    def holds(modules: Iterable[nn.Module]) -> bool:
        return any(id(parameter) in held for module in modules for parameter in module.parameters())

    for stream, residuals in list(_unseen.items()):
        if not holds(residuals):
            continue
        del _unseen[stream]
        # With a gradient it is part of what is being trained.
        if not holds([stream]) and any(parameter.grad is not None for parameter in stream.parameters()):
            warnings.warn(
                "this optimiser has residuals of a DeltaStream, but not its readout and expansion, which stay as they "
                "are: make the stream an attribute of your module (self.stream = stream), or set "
                "requires_grad_(False) on it if that is meant.",
                stacklevel=3,
            )

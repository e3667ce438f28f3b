"""What is looked at when an optimiser first steps over a module: once, however many steps and optimisers there are."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class _Look(NamedTuple):
    parameters: Callable[[nn.Module], Iterable[Tensor]]
    look: Callable[[nn.Module, Optimizer], None]


_waiting: "WeakKeyDictionary[nn.Module, _Look]" = WeakKeyDictionary()
"""Modules that no optimiser has stepped over yet."""
_searched: "WeakKeyDictionary[Optimizer, int]" = WeakKeyDictionary()
"""Optimisers that hold none of those, and how many parameters they had: their further steps cost nothing."""
_hooks: list[Any] = []


def at_first_step(
    module: nn.Module,
    parameters: Callable[[nn.Module], Iterable[Tensor]],
    look: Callable[[nn.Module, Optimizer], None],
) -> None:
    """Call `look(module, optimizer)` before the first step of an optimiser that holds one of `parameters(module)`.

    Neither function may hold the module, which is forgotten with its last user.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
    _waiting[module] = _Look(parameters, look)
    _searched.clear()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _waiting:
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _searched.get(optimizer) == count:
        return
    _searched[optimizer] = count
    held = held_by(optimizer)
    for module, (parameters, look) in list(_waiting.items()):
        if any(id(parameter) in held for parameter in parameters(module)):
            del _waiting[module]
            look(module, optimizer)


def held_by(optimizer: Optimizer) -> set[int]:
    """The identities of an optimiser's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

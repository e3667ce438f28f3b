"""What is looked at when an optimiser first steps over a module: before that step, once, and not in every step."""

import gc
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from deepdelta.nn import first_step
from deepdelta.nn.first_step import at_first_step


def test_once_by_the_first_optimiser_that_holds_it_and_others_search_once() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    asked, seen = list[nn.Module](), list[tuple[nn.Module, Optimizer]]()

    def parameters(of: nn.Module) -> Iterable[Tensor]:
        asked.append(of)
        return of.parameters()

    at_first_step(module, parameters, lambda one, optimizer: seen.append((one, optimizer)))
    foreign, own = SGD(other.parameters()), SGD(module.parameters())
    for _ in range(3):
        foreign.step()
    assert asked == [module] and not seen
    for _ in range(2):
        own.step()
    assert seen == [(module, own)] and asked == [module, module]


def test_parameters_that_an_optimiser_gets_later_are_found() -> None:
    module, seen = nn.Linear(2, 2), list[Optimizer]()
    at_first_step(module, lambda one: one.parameters(), lambda one, optimizer: seen.append(optimizer))
    optimizer = SGD(nn.Linear(2, 2).parameters())
    optimizer.step()
    optimizer.add_param_group({"params": module.weight})
    assert not seen
    optimizer.step()
    assert seen == [optimizer]


def test_a_module_is_forgotten_with_its_last_user() -> None:
    module = nn.Linear(2, 2)
    at_first_step(module, lambda one: one.parameters(), lambda one, optimizer: None)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None and gone not in first_step._waiting.keyrefs()
    SGD([torch.zeros(1, requires_grad=True)]).step()

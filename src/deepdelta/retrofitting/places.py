"""The tensors of a model under the names that they had before modules of others were put around parts of it.

torch.compile, activation checkpointing and PEFT wrap modules, parametrizations compute a parameter of others: names
change, the module that a tensor belongs to does not.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from deepdelta.nn.adding import WRAPPERS


class Place(NamedTuple):
    """Where a tensor is held."""

    owner: nn.Module
    name: str

    @property
    def sources(self) -> list[Tensor]:
        """What is learned: the tensor itself, or those that a parametrization computes it of."""
        if is_parametrized(self.owner, self.name):
            return list(self.owner.get_submodule(f"parametrizations.{self.name}").parameters())
        return [getattr(self.owner, self.name)]

    @property
    def trained(self) -> bool:
        return any(source.requires_grad for source in self.sources)

    def train(self) -> None:
        for source in self.sources:
            source.requires_grad_(True)

    @property
    def is_buffer(self) -> bool:
        return self.name in self.owner._buffers

    @property
    def can_be_filled(self) -> bool:
        """False where a parametrization has no inverse."""
        if not is_parametrized(self.owner, self.name):
            return True
        steps = self.owner.get_submodule(f"parametrizations.{self.name}").children()
        return all(hasattr(step, "right_inverse") for step in steps)

    @torch.no_grad()
    def value(self) -> Tensor:
        return getattr(self.owner, self.name).detach()  # type: ignore[no-any-return]

    @torch.no_grad()
    def fill(self, value: Tensor) -> None:
        if is_parametrized(self.owner, self.name):
            setattr(self.owner, self.name, value.to(self.sources[0]))
        else:
            getattr(self.owner, self.name).copy_(value)


def named(model: nn.Module, known: Mapping[nn.Module, str]) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, under its name in `known` or the one that its place among the modules gives.

    Of the modules of PEFT, and of what they hold, only those in `known` are the model's own (all, if it is empty).
    """
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        name = known.get(module, name)
        if module in seen:
            return
        seen.add(module)
        foreign = bool(known) and module not in known and of_peft(module)
        if not foreign:
            yield name, module
        for child, inner in module._modules.items():
            if inner is None or (child == "parametrizations" and is_parametrized(module)):
                continue
            if not foreign or inner in known or of_peft(inner):
                yield from walk(inner, name if child in WRAPPERS else join(name, child))

    return walk(model, "")


def places(model: nn.Module, known: Mapping[nn.Module, str]) -> dict[str, Place]:
    """Every tensor of the state dict by name, a tied one under the first of its names alone."""
    found: dict[str, Place] = {}
    seen: set[int] = set()
    for name, module in named(model, known):
        lasting = {key: one for key, one in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for key, tensor in (module._parameters | lasting).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[join(name, key)] = Place(module, key)
        if is_parametrized(module):
            found |= {join(name, key): Place(module, key) for key in module.get_submodule("parametrizations")._modules}
    return found


def join(*parts: str) -> str:
    return ".".join(filter(None, parts))


def of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")

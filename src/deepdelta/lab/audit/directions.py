"""Other directions along which a sublayer could erase: whether they lie in the state more than by chance.

An erase takes b k^T X away, so it can do no more than k finds in X. Along a random direction of R^n that is a cosine of
E|cos| = Gamma(n / 2) / (sqrt(pi) Gamma((n + 1) / 2)), about 0.8 / sqrt(n).

Shapes: B batch, T tokens, V value channels, D width, H blocks of it, E width of a block.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.lab.audit.findings import Alternative
from deepdelta.models import GPT
from deepdelta.models.attention import Attention
from deepdelta.nn import DeltaResidual

LAYER = 2
"""Sublayers that a snapshot is old."""


@dataclass
class Alternatives:
    """Sums of |cos| by residual and direction, over the passes that were watched.

    `heads`: the branch's output and the state in as many blocks as attention has heads, block by block. `value`: what
    attention has read of the values, before its output map, where it is as wide as the state. `snapshot`: the state
    that the sublayer a layer before was given.
    """

    sums: dict[tuple[str, str], float] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: GPT) -> Iterator[None]:
        """Within it, every forward pass of `model` counts."""
        residuals = {name: part for name, part in model.named_modules() if isinstance(part, DeltaResidual)}
        states, heads = dict[str, Tensor](), model.config.heads
        last: deque[Tensor] = deque(maxlen=LAYER)
        if model.config.dim % heads:
            heads = 1

        def before(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Any, ...]) -> None:
                states[name] = state_BTVD = args[0]
                if len(last) == LAYER:
                    self._add(name, "snapshot", state_BTVD, last[0])
                last.append(state_BTVD)

            return note

        def after(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Any, ...], h_BTD: Tensor) -> None:
                if heads > 1:
                    state_BTVHE, h_BTHE = (one.reshape(*one.shape[:-1], heads, -1) for one in (states[name], h_BTD))
                    self._add(name, "heads", state_BTVHE, h_BTHE.unsqueeze(-3))

            return note

        def read(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args[0].shape[-1] == states[name].shape[-1]:
                    self._add(name, "value", states[name], args[0].unsqueeze(-2))

            return note

        with ExitStack() as hooks:
            hooks.callback(model.register_forward_pre_hook(lambda module, args: last.clear()).remove)
            for name, residual in residuals.items():
                branch = residual.wrapped()
                hooks.callback(residual.register_forward_pre_hook(before(name)).remove)
                hooks.callback(branch.register_forward_hook(after(name)).remove)
                if isinstance(branch, Attention):
                    hooks.callback(branch.out.register_forward_pre_hook(read(name)).remove)
            yield

    def _add(self, name: str, direction: str, state: Tensor, k: Tensor) -> None:
        cosines = F.cosine_similarity(state.double(), k.double(), dim=-1, eps=torch.finfo(torch.float64).tiny).abs()
        key = name, direction
        self.sums[key] = self.sums.get(key, 0.0) + float(cosines.sum())
        self.counts[key] = self.counts.get(key, 0) + cosines.numel()
        self.widths[direction] = state.shape[-1]

    def of(self, name: str) -> tuple[Alternative, ...]:
        """Those of the residual of this name."""
        return tuple(
            Alternative(name=kind, cosine=self.sums[residual, kind] / count, chance=chance(self.widths[kind]))
            for (residual, kind), count in self.counts.items()
            if residual == name
        )


def chance(width: int) -> float:
    """E|cos| of a fixed and a random direction of R^width."""
    return math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2)) / math.sqrt(math.pi)

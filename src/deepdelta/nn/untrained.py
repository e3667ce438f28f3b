"""A stream that stands in no module tree has no optimiser: said once, at the first step over its residuals."""

import warnings
from collections.abc import Iterator
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from deepdelta.nn.first_step import at_first_step, held_by

_made: "WeakKeyDictionary[nn.Module, WeakSet[nn.Module]]" = WeakKeyDictionary()
"""The residuals that streams have made."""


def watch(stream: nn.Module, residual: nn.Module) -> None:
    """Look at the first optimiser step over a residual that this stream made."""
    _made.setdefault(stream, WeakSet()).add(residual)
    at_first_step(stream, _of_residuals, _look)


def _of_residuals(stream: nn.Module) -> Iterator[Tensor]:
    return (parameter for residual in _made[stream] for parameter in residual.parameters())


def _look(stream: nn.Module, optimizer: Optimizer) -> None:
    del _made[stream]
    own, held = list(stream.parameters()), held_by(optimizer)
    # With a gradient it is part of what is being trained.
    if not any(id(one) in held for one in own) and any(one.grad is not None for one in own):
        warnings.warn(
            "this optimiser has residuals of a DeltaStream, but not its readout and expansion, which stay as they "
            "are: make the stream an attribute of your module (self.stream = stream), or set "
            "requires_grad_(False) on it if that is meant.",
            stacklevel=4,
        )

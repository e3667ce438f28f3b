"""The fused step on the CPU: numba's loops over torch's memory, the tokens shared out among torch's own threads."""

from typing import Any

from deepdelta.ops.backends.cpu import kernels
from deepdelta.ops.backends.cpu.records import Kernel, team_of
from deepdelta.ops.step.arguments import SUMMED, Given, Gradients, Incoming, Known, Made, Replayed

_forward = Kernel(kernels.forward, "N", Given, Made)
_backward = Kernel(kernels.backward, "N", Given, Known, Incoming, Gradients)
replay = Kernel(kernels.replay, "N", Replayed)
"""Fill X + h a^T: X' again, bit for bit, from the a that the forward pass stored."""


def forward(given: Given, made: Made) -> None:
    """Fill `made` and, with a gating, the write that is given."""
    _forward(given, made)


def backward(given: Given, known: Known, incoming: Incoming, gradients: Gradients) -> Gradients:
    """Fill `gradients`, those of parameters in tensors of their own."""
    # Every thread sums up its own share.
    team = team_of(given.state.shape[0])
    summed = {name: getattr(given, name.removeprefix("d_")) for name in SUMMED}
    sums: dict[str, Any] = {name: None if p is None else p.new_zeros(team, *p.shape) for name, p in summed.items()}
    _backward(given, known, incoming, gradients._replace(**sums))
    totals: dict[str, Any] = {name: None if each is None else each.sum(0) for name, each in sums.items()}
    return gradients._replace(**totals)

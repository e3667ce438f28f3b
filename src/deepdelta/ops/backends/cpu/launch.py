"""The fused step on the CPU: numba's loops over torch's memory, the tokens shared out among torch's own threads."""

from deepdelta.ops.backends.cpu import kernels
from deepdelta.ops.backends.cpu.records import Kernel, team_of
from deepdelta.ops.step.arguments import Given, Gradients, Incoming, Known, Made, Replayed

_forward = Kernel(kernels.forward, "N", Given, Made)
_backward = Kernel(kernels.backward, "N", Given, Known, Incoming, Gradients)
replay = Kernel(kernels.replay, "N", Replayed)
"""Fill X + h a^T: X' again, bit for bit, from the a that the forward pass stored."""


def forward(given: Given, made: Made) -> None:
    """Fill `made` and, with a gating, the write that is given."""
    _forward(given, made)


def backward(given: Given, known: Known, incoming: Incoming, gradients: Gradients) -> Gradients:
    """Fill `gradients`, to which those of compression and norm weight are added."""
    # Every thread sums up its own share.
    team = team_of(given.state.shape[0])
    sums = [None if p is None else p.new_zeros(team, *p.shape) for p in (given.compression, given.norm_weight)]
    _backward(given, known, incoming, gradients._replace(d_compression=sums[0], d_norm_weight=sums[1]))
    totals = [None if total is None else total.sum(0) for total in sums]
    return gradients._replace(d_compression=totals[0], d_norm_weight=totals[1])

"""The fused step on the CPU: numba's loops over torch's memory, the tokens shared out among torch's own threads."""

from deepdelta.ops.backends.cpu import kernels
from deepdelta.ops.backends.cpu.records import Kernel, team_of
from deepdelta.ops.step.arguments import Given, Gradients, Incoming, Known, Made, Replayed, summed

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
    team = team_of(given.state.shape[0], given.state.numel())
    return summed(
        given,
        gradients,
        lambda parameter: parameter.new_zeros(team, *parameter.shape),
        lambda filled: _backward(given, known, incoming, filled),
    )

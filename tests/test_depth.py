"""Gradients of deep stacks at the start, in fp64: the default's are the plain residual's, the delta rule's grow."""

import pytest
import torch
from torch import Tensor, nn

from deepdelta import DeltaStream

D, DEPTH = 32, 150


def at_the_input(**options: object) -> tuple[Tensor, float]:
    """dL/dx under a random cotangent of the normed output, and the root mean square of the last state."""
    torch.manual_seed(0)
    stream = DeltaStream(D, seed=0, **options).double()  # type: ignore[arg-type]
    branches = (nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)) for _ in range(DEPTH))
    residuals = [stream.wrap(branch).double() for branch in branches]
    torch.manual_seed(1)
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    state = stream.expand(x)
    for residual in residuals:
        state = residual(state)
    out = nn.functional.rms_norm(stream.reduce(state), (D,))
    (slope,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    return slope, state.square().mean().sqrt().item()


@pytest.mark.parametrize("value_channels", [1, 4])
def test_the_default_starts_with_the_gradients_of_the_plain_residual(value_channels: int) -> None:
    plain, _ = at_the_input(rule="additive")
    slope, _ = at_the_input(value_channels=value_channels)
    torch.testing.assert_close(slope, plain, rtol=1e-9, atol=0)


def test_a_state_that_is_bounded_multiplies_gradients_at_every_sublayer() -> None:
    """docs/default.md#depth: what a sublayer changes stays the same share of a state that does not grow."""
    plain, grown = at_the_input(rule="additive")
    slope, bounded = at_the_input(rule="delta")
    writing, _ = at_the_input(rule="write_only")
    assert bounded < 0.7 < 2 < grown
    assert slope.norm() > 100 * plain.norm() and writing.norm() < 3 * plain.norm()

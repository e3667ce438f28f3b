"""Gradients of deep stacks at the start, in fp64: the default's are the plain residual's, the delta rule's grow."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deepdelta import DeltaStream
from deepdelta.lab.analysis.stored import load_stored
from deepdelta.lab.bench.depth import MHC, DepthResults, Stack, measured

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


def test_the_bench_measures_every_sublayer() -> None:
    """Against the plain residual written out, and the gradient before the last sublayers by differences of the loss."""
    stack = Stack(sublayers=5, dim=8)
    curves = {one.kind: one for one in measured(stack)}
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(5)]
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    along = torch.randn_like(x)
    states = [x]
    for branch in branches:
        states.append(states[-1] + branch.double()(nn.functional.rms_norm(states[-1], (8,), eps=1e-5)))
    expected = [state.square().mean().sqrt().item() for state in states]
    assert curves["plain residual"].state == pytest.approx(expected, rel=1e-5)

    def loss(state: Tensor, sublayer: int) -> Tensor:
        for branch in branches[sublayer:]:
            state = state + branch(nn.functional.rms_norm(state, (8,), eps=1e-5))
        return (nn.functional.rms_norm(state, (8,)) * along).sum()

    for sublayer in (0, 3, 5):
        slopes = torch.autograd.functional.jacobian(lambda s, at=sublayer: loss(s, at), states[sublayer].detach())
        assert curves["plain residual"].gradient[sublayer] == pytest.approx(slopes.norm().item(), rel=1e-5)
    for kind in ("default, V = 1", "default, V = 4"):
        assert curves[kind].gradient == pytest.approx(curves["plain residual"].gradient, rel=1e-5)
    assert all(len(one.state) == len(one.gradient) == 6 for one in curves.values())


def test_what_the_page_says_of_1000_sublayers() -> None:
    root = Path(__file__).parents[1]
    results = load_stored(DepthResults, root / "results" / "bench-depth" / "results.json", "deepdelta bench")
    curves, page = {one.kind: one for one in results.curves}, (root / "docs" / "default.md").read_text(encoding="utf-8")
    assert results.stack.sublayers == 1000 and not results.quick
    plain, one, four, mhc = (curves[k] for k in ("plain residual", "delta rule, V = 1", "delta rule, V = 4", MHC))
    for kind in ("default, V = 1", "default, V = 4"):
        assert curves[kind].gradient == pytest.approx(plain.gradient, rel=3e-6)
        assert curves[kind].state == pytest.approx(plain.state, rel=3e-6)
    for said in (
        f"|dL/dX| is {plain.gradient[0]:.1f} with the plain residual",
        f'mHC with 4 streams has {mhc.gradient[0]:.1f}, `rule="delta"` {one.gradient[0]:.0e} at V = 1 and',
        f"{four.gradient[0]:.0e} at V = 4".replace("e+", "e"),
        f"grows to {plain.state[-1]:.1f} and that of mHC to {mhc.state[-1]:.1f}.",
    ):
        assert said.replace("e+", "e") in page, said
    assert max(one.state[100:]) < 0.6 > max(four.state[100:]) and round(four.state[-1], 1) == 0.5

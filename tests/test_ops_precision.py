"""Low precision: rounded once, at the end, to the state's dtype, also under autocast; sizes from 1e-30 to 1e15."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepdelta.ops import accumulation_dtype, delta_rewrite, read_along, rewrite
from helpers import outer, randn, unit

HALVES = [torch.bfloat16, torch.float16]
NAMES = ["state", "direction", "target", "gate"]


def inputs(dtype: torch.dtype, batch: int = 64, channels: int = 4, width: int = 96) -> dict[str, Tensor]:
    """Inputs that `dtype` holds exactly, so that all error is the operation's."""
    tensors = (
        randn(batch, channels, width),
        unit(batch, width, seed=1),
        randn(batch, channels, seed=2),
        2 * torch.rand(batch, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    )
    return {name: tensor.to(dtype) for name, tensor in zip(NAMES, tensors, strict=True)}


def eager(state: Tensor, direction: Tensor, target: Tensor, gate: Tensor) -> Tensor:
    """What one would write by hand, in the dtype of the inputs."""
    read = (state @ direction[..., None]).squeeze(-1)
    return state + outer(gate[..., None] * (target - read), direction)


def with_gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype, autocast: bool = False
) -> list[Tensor]:
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        new = function(**leaves)
    cotangent = randn(*new.shape, seed=9).to(torch.bfloat16).to(new.dtype)
    return [new.detach(), *torch.autograd.grad(new, list(leaves.values()), cotangent)]


def relative(actual: Tensor, oracle: Tensor) -> float:
    return float((actual.double() - oracle).norm() / oracle.norm())


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("dtype", HALVES)
def test_error_is_that_of_one_rounding(dtype, channels):
    tensors = inputs(dtype, channels=channels)
    oracle = eager(**{name: tensor.double() for name, tensor in tensors.items()})
    new = delta_rewrite(**tensors)
    assert new.dtype == dtype
    # Half a unit in the last place. delta_rewrite forms beta * v in the given dtype, hence the product's rounding.
    product = (tensors["gate"][:, None] * tensors["target"]).double()
    exact = oracle + outer(
        product - tensors["gate"].double()[:, None] * tensors["target"].double(), tensors["direction"].double()
    )
    bound = exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-5
    assert ((new.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("dtype", HALVES)
def test_no_worse_than_eager_in_value_and_gradient(dtype, channels):
    tensors = inputs(dtype, channels=channels)
    oracle = with_gradients(eager, tensors, torch.float64)
    ours, theirs = (with_gradients(function, tensors, dtype) for function in (delta_rewrite, eager))
    for name, one, other, exact in zip(["new state", *NAMES], ours, theirs, oracle, strict=True):
        assert relative(one, exact) <= 1.05 * relative(other, exact), name


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_dtypes(dtype):
    tensors = inputs(dtype, batch=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert accumulation_dtype(dtype) == wide
    assert read_along(tensors["state"], tensors["direction"]).dtype == wide
    new, read = rewrite(tensors["state"], tensors["direction"], tensors["target"], tensors["gate"][:, None])
    assert (new.dtype, read.dtype) == (dtype, wide)
    assert rewrite(tensors["state"], tensors["direction"].float(), 1.0)[0].dtype == dtype


@pytest.mark.parametrize("channels", [1, 4])
def test_autocast_does_not_round_the_state(channels):
    """Under autocast the arithmetic stays in fp32: the same numbers, bit for bit, in value and in gradient."""
    tensors = inputs(torch.float32, channels=channels)
    plain = with_gradients(delta_rewrite, tensors, torch.float32)
    inside = with_gradients(delta_rewrite, tensors, torch.float32, autocast=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read = read_along(tensors["state"], tensors["direction"])
    assert read.dtype == torch.float32
    for name, one, other in zip(["new state", *NAMES], inside, plain, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e15])
def test_fp32_sizes_of_the_state(size):
    """The rewrite is linear in (state, target): no size of theirs loses digits, except below fp32's smallest."""
    tensors = inputs(torch.float32)
    tensors["state"], tensors["target"] = size * tensors["state"], size * tensors["target"]
    oracle = eager(**{name: tensor.double() for name, tensor in tensors.items()})
    assert relative(delta_rewrite(**tensors), oracle) < 1e-6

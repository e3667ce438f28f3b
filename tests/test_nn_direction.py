"""Normalised directions at their extremes: h = 0 is defined, its derivative bounded by 1 / eps; no size overflows."""

from typing import Any

import pytest
import torch
from torch import nn

from deepdelta import DeltaStream, UserError, recording, use_backend
from deepdelta.nn import DeltaResidual
from helpers import near, randn

DIM = 6
ALONG_K = ["delta", "write_only", "erase_only", "additive_erase", "two_gate"]


def manual(**options: Any) -> DeltaResidual:
    return DeltaStream(DIM, **{"value_channels": 3, "seed": 0, **options}).wrap()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", ["unit", "operator", "bounded", "free"])
def test_zero_direction_leaves_the_state_and_has_finite_gradients(norm, dtype):
    residual = manual(direction_norm=norm).to(dtype)
    state = randn(4, 3, DIM).to(dtype).requires_grad_()
    h = torch.zeros(4, DIM, dtype=dtype, requires_grad=True)
    new = residual.open(state)[1](h)
    assert torch.equal(new, state)
    new.backward(randn(4, 3, DIM, seed=1).to(dtype))
    for tensor in (h, state, *residual.parameters()):
        assert tensor.grad.isfinite().all()
    assert h.grad.abs().max() > 0


@pytest.mark.parametrize("rule", ["additive", *ALONG_K])
def test_zero_direction_under_every_rule(rule):
    residual = manual(rule=rule)
    state, h = randn(4, 3, DIM).float().requires_grad_(), torch.zeros(4, DIM, requires_grad=True)
    new = residual.open(state)[1](h)
    assert torch.equal(new, state)
    new.sum().backward()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
def test_derivative_at_zero_is_the_discrepancy_over_eps(eps):
    """k = h / eps to first order, so dX'_j / dh = beta v_j / eps: bounded by 1 / eps per unit of write."""
    residual = manual(gate="constant", gate_init=1.5, target="constant", target_value=0.8, direction_eps=eps).double()
    state, h = randn(3, DIM), torch.zeros(DIM, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(residual.open(state)[1], h)
    expected = 1.5 * 0.8 / eps * torch.eye(DIM, dtype=torch.float64)
    near(jacobian, expected.expand(3, DIM, DIM))


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_derivative_of_the_direction_is_bounded_everywhere(eps):
    """With v = 1, beta = 1 and X = 0 the new state is k itself: its Jacobian has norm at most 1 / eps for every h."""
    residual = manual(
        value_channels=1, rule="write_only", gate="constant", target="constant", target_value=1.0, direction_eps=eps
    ).double()
    close = residual.open(torch.zeros(1, DIM, dtype=torch.float64))[1]
    for exponent in range(-12, 13):
        h = randn(DIM, seed=exponent + 20) * 10.0**exponent
        jacobian = torch.autograd.functional.jacobian(lambda h: close(h)[0], h)
        assert torch.linalg.matrix_norm(jacobian, 2) <= (1 + 1e-9) / eps
        assert float(close(h).norm()) <= 1


@pytest.mark.parametrize("norm", ["unit", "operator", "bounded"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e15])
def test_fp32_sizes_of_the_branch_output(size, norm):
    """fp32 agrees with fp64 for the same h, and both gradients are finite, over all sizes."""
    results = []
    for dtype in (torch.float32, torch.float64):
        residual = manual(direction_norm=norm).to(dtype)
        state = randn(4, 3, DIM).float().to(dtype).requires_grad_()
        h = (randn(4, DIM, seed=1).float() * size).to(dtype).requires_grad_()
        new = residual.open(state)[1](h)
        new.backward(randn(4, 3, DIM, seed=2).float().to(dtype))
        results.append([tensor.double() for tensor in (new.detach(), state.grad, h.grad * size)])
    for single, double in zip(*results, strict=True):
        assert single.isfinite().all()
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sizes(dtype):
    """Squares of an fp16 branch output overflow fp16 (300^2 > 65504); the norm is taken in fp32."""
    residual = manual().to(dtype)
    state, h = randn(4, 3, DIM).to(dtype), (300 * randn(4, DIM, seed=1)).to(dtype)
    new = residual.open(state)[1](h)
    double = manual().double()
    double.load_state_dict({name: tensor.double() for name, tensor in residual.state_dict().items()})
    torch.testing.assert_close(new.double(), double.open(state.double())[1](h.double()), rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("eps", [1e-30, 1e-25, 1e-20])
def test_every_admitted_eps_keeps_zero_defined_in_fp32(eps):
    """An eps whose square, or whose inverse square, does not exist in fp32 must be refused or work."""
    try:
        residual = manual(direction_eps=eps)
    except UserError as error:
        assert "direction_eps" in str(error)
        return
    h = torch.zeros(DIM, requires_grad=True)
    state = torch.ones(3, DIM)
    new = residual.open(state)[1](h)
    assert torch.equal(new, state)
    new.sum().backward()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3, 1e12])
def test_bounded_directions_stay_stable_by_construction(size):
    """0 <= beta |k|^2 <= 2 for the largest gate and any h, so that the rewrite never expands a state at target 0."""
    residual = manual(direction_norm="bounded", rule="erase_only", gate="constant", gate_init=2.0).double()
    state, records = randn(8, 3, DIM), []
    with recording(residual, lambda name, record: records.append(record)):
        new = residual.open(state)[1](size * randn(8, DIM, seed=1))
    assert (records[0].beta * records[0].norm[..., None] ** 2 <= 2).all()
    assert (new.norm(dim=-1) <= state.norm(dim=-1) * (1 + 1e-12)).all()


def test_free_directions_are_not_bounded():
    """The study form really is unconstrained: |k| is the rms of h."""
    residual = manual(direction_norm="free").double()
    h, records = 50 * randn(8, DIM, seed=1), []
    with recording(residual, lambda name, record: records.append(record)):
        residual.open(randn(8, 3, DIM))[1](h)
    near(records[0].norm, h.square().mean(-1).sqrt())
    assert (records[0].norm > 5).any()


def test_low_precision_form_of_the_unit_direction():
    """k = RMSNorm(h; eps^2 / d) / sqrt(d), the form that the method names for low precision."""
    eps, h, state = 1e-2, 0.01 * randn(8, DIM, seed=1), randn(8, 3, DIM)
    k = torch.nn.functional.rms_norm(h, (DIM,), eps=eps * eps / DIM) / DIM**0.5
    residual = manual(rule="erase_only", gate="constant", gate_init=0.9, direction_eps=eps).double()
    read = (state * k[:, None]).sum(-1, keepdim=True)
    near(residual.open(state)[1](h), state - 0.9 * read * k[:, None])


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("pool", ["mean", "flatten", "attention"])
def test_fp16_with_tokens_of_nothing_has_finite_gradients_at_the_eps_that_is_advised(pool, backend):
    """The direction is 0 there, and the branch writes its bias: the derivative by the direction is 1 / eps."""
    stream = DeltaStream(
        16, 4, direction="pooled", target="branch", direction_pool=pool, direction_eps=1e-3, seed=0, rule="delta"
    )
    torch.manual_seed(0)
    network = nn.ModuleList([stream, stream.wrap(nn.Linear(16, 16))]).half()
    use_backend(network, backend)
    x = torch.zeros(2, 5, 16, dtype=torch.float16, requires_grad=True)
    result = stream.reduce(network[1](stream.expand(x)))
    result.float().sum().backward()
    assert network[1].direction.outer.bias.grad.any()
    assert all(tensor.isfinite().all() for tensor in (result, x.grad, *(p.grad for p in network.parameters())))

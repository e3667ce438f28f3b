"""A single I - beta k k^T against dense linear algebra and the closed forms of docs/method.md."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from deepdelta.errors import UserError
from deepdelta.operator import DeltaOperator

GATES = st.sampled_from([0.0, 1.0, 2.0]) | st.floats(0, 2)
BATCHES = st.sampled_from([(), (1,), (3,), (2, 3)])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.functional.normalize(randn(*shape, seed=seed, dtype=dtype), dim=-1)


def dense(direction: Tensor, gate: Tensor) -> Tensor:
    """The definition, written out."""
    eye = torch.eye(direction.shape[-1], dtype=direction.dtype)
    return eye - gate[..., None, None] * direction[..., :, None] * direction[..., None, :]


@settings(max_examples=60, deadline=None)
@given(BATCHES, st.integers(1, 7), st.integers(1, 4), GATES, st.sampled_from([0.0, 0.6, 1.0, 1.7]), st.integers(0, 999))
def test_every_quantity_equals_dense_linear_algebra(batch, dim, channels, beta, norm, seed):
    direction, gate = norm * unit(*batch, dim, seed=seed), torch.full(batch, beta, dtype=torch.float64)
    operator, expected = DeltaOperator(direction, gate), dense(direction, gate)
    state = randn(*batch, channels, dim, seed=seed + 1)
    torch.testing.assert_close(operator.dense(), expected)
    torch.testing.assert_close(operator.apply(state), (expected @ state.mT).mT)
    torch.testing.assert_close(operator.eigenvalues().sort().values, torch.linalg.eigvalsh(expected))
    torch.testing.assert_close(operator.singular_values(), torch.linalg.svdvals(expected))
    torch.testing.assert_close(operator.determinant(), torch.linalg.det(expected))
    lifted = torch.linalg.det(torch.stack([torch.kron(torch.eye(channels), a) for a in expected.reshape(-1, dim, dim)]))
    torch.testing.assert_close(operator.determinant(channels).reshape(-1), lifted)
    torch.testing.assert_close(operator.power(5).dense(), torch.linalg.matrix_power(expected, 5), rtol=1e-9, atol=1e-9)
    assert operator.effective_rank(1e-6).tolist() == torch.linalg.matrix_rank(
        torch.eye(dim, dtype=torch.float64) - expected, atol=1e-6, rtol=0.0
    ).tolist()  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(BATCHES, st.integers(1, 6), st.floats(0, 0.9) | st.floats(1.1, 2), st.integers(1, 5), st.integers(0, 999))
def test_inverse_and_integer_powers(batch, dim, beta, n, seed):
    direction, gate = unit(*batch, dim, seed=seed), torch.full(batch, beta, dtype=torch.float64)
    operator, expected = DeltaOperator(direction, gate), dense(direction, gate)
    closed_form = dense(direction, -gate / (1 - gate))
    torch.testing.assert_close(operator.inverse().dense(), closed_form, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(operator.inverse().determinant(), 1 / (1 - gate))
    for exponent in (0, n, -n):
        actual = operator.power(exponent).dense()
        torch.testing.assert_close(actual, torch.linalg.matrix_power(expected, exponent), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("beta", "name"),
    [
        (0.0, "identity"),
        (1e-3, "under-relaxed"),
        (0.999, "under-relaxed"),
        (1.0, "projection"),
        (1.001, "over-relaxed"),
        (1.999, "over-relaxed"),
        (2.0, "reflection"),
        (2.001, "unstable"),
        (-1e-3, "unstable"),
    ],
)
def test_regimes_of_a_rounded_unit_direction_in_both_dtypes(beta, name, dtype):
    for seed in range(5):
        direction = unit(2, 3, 333, seed=seed, dtype=dtype)
        regime = DeltaOperator(direction, torch.full((2, 3), beta, dtype=dtype), unbounded=True).regime()
        assert regime.tolist() == [[name] * 3] * 2


def test_regime_is_per_entry_and_reads_beta_times_the_squared_norm():
    direction = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 1.0]])
    operator = DeltaOperator(direction, torch.tensor([2.0, 0.25, 1.0, 2.0]))
    assert operator.regime().tolist() == ["identity", "projection", "under-relaxed", "reflection"]
    assert DeltaOperator(torch.tensor([2.0]), torch.tensor(1.0)).regime().tolist() == "unstable"


def test_non_unit_direction_is_not_normalised():
    operator = DeltaOperator(torch.tensor([0.0, 3.0, 4.0]), torch.tensor(0.04))
    torch.testing.assert_close(operator.eigenvalues(), torch.tensor([1.0, 1.0, 1 - 0.04 * 25]))
    torch.testing.assert_close(operator.determinant(2), torch.tensor((1 - 0.04 * 25) ** 2))
    assert operator.regime().tolist() == "projection"


def test_one_gate_per_value_channel_multiplies_the_determinants():
    direction, gate = unit(4), torch.tensor([0.3, 1.4, 2.0], dtype=torch.float64)
    operator = DeltaOperator(direction.expand(3, 4), gate)
    lifted = torch.block_diag(*dense(direction.expand(3, 4), gate))
    torch.testing.assert_close(operator.determinant().prod(-1), torch.linalg.det(lifted))
    state = randn(3, 4, seed=1)
    torch.testing.assert_close(operator.apply(state[:, None])[:, 0].flatten(), lifted @ state.flatten())


def test_gradients_of_everything_real():
    direction = randn(2, 4).requires_grad_()
    gate = torch.tensor([0.3, 1.6], dtype=torch.float64, requires_grad=True)
    state = randn(2, 3, 4, seed=1).requires_grad_()

    def outputs(k: Tensor, beta: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        operator = DeltaOperator(k, beta, unbounded=True)
        inverse, cube = operator.inverse(), operator.power(3)
        spectra = (operator.eigenvalues(), operator.singular_values(), operator.determinant(3))
        return (
            operator.apply(x),
            operator.dense(),
            inverse.apply(x),
            cube.dense(),
            operator.power(-2).dense(),
            *spectra,
        )

    assert gradcheck(outputs, (direction, gate, state))


def test_determinant_and_eigenvalues_have_gradients_at_a_projection_and_at_zero():
    gate = torch.ones(2, dtype=torch.float64, requires_grad=True)
    direction = torch.stack([unit(3), torch.zeros(3, dtype=torch.float64)]).requires_grad_()
    for quantity in (lambda o: o.determinant(), lambda o: o.eigenvalues()[..., -1]):
        grads = torch.autograd.grad(quantity(DeltaOperator(direction, gate)).sum(), (gate, direction))
        torch.testing.assert_close(grads[0], torch.tensor([-1.0, 0.0], dtype=torch.float64))
        torch.testing.assert_close(grads[1], -2 * direction.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_preserved(dtype):
    operator = DeltaOperator(unit(2, 3, dtype=dtype), torch.full((2,), 0.5, dtype=dtype))
    results = [operator.apply(randn(2, 1, 3, dtype=dtype)), operator.dense(), operator.eigenvalues()]
    results += [
        operator.singular_values(),
        operator.determinant(2),
        operator.inverse().dense(),
        operator.power(-2).dense(),
    ]
    assert {result.dtype for result in results} == {dtype}


def error(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_a_gate_outside_the_range_names_value_entries_and_remedy():
    direction, gate = unit(2, 3, 4), torch.ones(2, 3, dtype=torch.float64)
    gate[1, 0], gate[1, 2] = 2.5, -1.0
    message = error(lambda: DeltaOperator(direction, gate))
    assert message.startswith("gate must lie in [0, 2], got 2.5 at batch entries (1, 0), (1, 2): ")
    assert "unbounded=True" in message
    torch.testing.assert_close(DeltaOperator(direction, gate, unbounded=True).dense(), dense(direction, gate))
    gate[:] = float("nan")
    assert "got nan at batch entries (0, 0), (0, 1), (0, 2), (1, 0), (1, 1) and 1 more" in error(
        lambda: DeltaOperator(direction, gate)
    )


def test_an_inverse_of_a_projection_names_the_entries():
    operator = DeltaOperator(unit(3, 64, dtype=torch.float32), torch.tensor([0.5, 1.0, 1.0001]))
    message = error(operator.inverse)
    assert message.startswith(
        "an inverse needs every singular value above rounding, so beta ||k||^2 != 1 in every factor"
    )
    assert "at batch entry (1,)" in message
    assert error(lambda: operator.power(-1)) == message
    assert "(no batch axes)" in error(DeltaOperator(torch.ones(1), torch.tensor(1.0)).inverse)


def test_shape_dtype_and_device_errors():
    k, beta = unit(2, 3), torch.ones(2, dtype=torch.float64)
    assert "shape (2,) for a direction of shape (2, 3), got (1,)" in error(lambda: DeltaOperator(k, beta[:1]))
    assert "must be float32 or float64, got torch.bfloat16" in error(
        lambda: DeltaOperator(k.bfloat16(), beta.bfloat16())
    )
    assert "torch.float64 on cpu, got torch.float32 on cpu" in error(lambda: DeltaOperator(k, beta.float()))
    assert "got torch.float64 on meta" in error(lambda: DeltaOperator(k, beta.to("meta")))
    operator = DeltaOperator(k, beta)
    for shape in [(2, 5, 4), (3, 5, 3), (5, 3), (2, 1, 5, 3)]:
        message = error(lambda shape=shape: operator.apply(randn(*shape)))
        assert re.search(r"state must have shape \(\.\.\., 2, V, 3\), .* got " + re.escape(str(shape)), message)
    assert "state must have the dtype" in error(lambda: operator.apply(randn(2, 5, 3).float()))
    assert operator.apply(randn(7, 2, 5, 3)).shape == (7, 2, 5, 3)
    for threshold in (-1.0, float("nan")):
        assert "threshold must be a finite number >= 0" in error(lambda t=threshold: operator.effective_rank(t))

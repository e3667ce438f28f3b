"""Products of rewrites in compact WY form against the product of dense matrices."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from deepdelta.errors import UserError
from deepdelta.operator import DeltaOperator


def factors(batch: tuple[int, ...], dim: int, length: int, seed: int, gates: list[float] | None = None):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(length, *batch, dim, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(draws, dim=-1)
    betas = 2 * torch.rand(length, *batch, generator=generator, dtype=torch.float64)
    if gates is not None:
        betas = torch.tensor(gates, dtype=torch.float64)[:, *[None] * len(batch)].expand(length, *batch)
    return directions, betas


def composed(directions: Tensor, betas: Tensor) -> DeltaOperator:
    return DeltaOperator.compose([DeltaOperator(k, beta) for k, beta in zip(directions, betas, strict=True)])


def product(directions: Tensor, betas: Tensor) -> Tensor:
    """A_L ... A_1 by dense matrix products."""
    eye = torch.eye(directions.shape[-1], dtype=directions.dtype)
    matrices = [
        eye - b[..., None, None] * k[..., :, None] * k[..., None, :] for k, b in zip(directions, betas, strict=True)
    ]
    return functools.reduce(lambda done, matrix: matrix @ done, matrices)


def assert_same_spectrum(actual: Tensor, expected: Tensor, atol: float = 1e-8) -> None:
    """As multisets: both polynomials with these roots agree at points around the unit disc."""
    points = 1.7 * torch.exp(1j * torch.arange(13, dtype=torch.float64))
    values = [(points - spectrum.to(points.dtype)[..., None]).prod(dim=-2) for spectrum in (actual, expected)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=atol)


@st.composite
def problems(draw):
    batch, dim, length = draw(st.sampled_from([(), (3,), (2, 2)])), draw(st.integers(1, 6)), draw(st.integers(1, 9))
    gates = draw(st.none() | st.lists(st.sampled_from([0.0, 0.7, 1.0, 2.0]), min_size=length, max_size=length))
    directions, betas = factors(batch, dim, length, draw(st.integers(0, 999)), gates)
    if length > 1 and draw(st.booleans()):
        directions[-1] = directions[0]  # a repeated direction: K loses rank
    if draw(st.booleans()):
        directions[length // 2] = 0.0
    return directions, betas


@settings(max_examples=120, deadline=None)
@given(problems(), st.integers(1, 3))
def test_every_quantity_equals_dense_linear_algebra(problem, channels):
    directions, betas = problem
    operator, expected = composed(*problem), product(*problem)
    dim, batch = directions.shape[-1], directions.shape[1:-1]
    state = torch.randn(*batch, channels, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(operator.dense(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.apply(state), (expected @ state.mT).mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.singular_values(), torch.linalg.svdvals(expected), rtol=1e-12, atol=1e-12)
    assert_same_spectrum(operator.eigenvalues(), torch.linalg.eigvals(expected))
    determinant = (1 - betas * directions.square().sum(-1)).prod(0)
    torch.testing.assert_close(operator.determinant(channels), determinant**channels, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        operator.power(3).dense(), torch.linalg.matrix_power(expected, 3), rtol=1e-11, atol=1e-11
    )
    rest = torch.eye(dim, dtype=torch.float64) - expected
    assert torch.equal(operator.effective_rank(1e-6), (torch.linalg.svdvals(rest) > 1e-6).sum(-1))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 999))
def test_inverse_and_negative_powers(dim, length, seed):
    directions, betas = factors((2,), dim, length, seed)
    betas = torch.where((betas - 1).abs() < 0.2, betas + 0.4, betas)
    operator, expected = composed(directions, betas), product(directions, betas)
    scale = torch.linalg.cond(expected).max().item()
    torch.testing.assert_close(
        operator.inverse().dense(), torch.linalg.inv(expected), rtol=1e-11 * scale, atol=1e-11 * scale
    )
    torch.testing.assert_close(
        operator.power(-2).dense() @ expected @ expected, torch.eye(dim, dtype=torch.float64).expand(2, dim, dim),
        rtol=0, atol=1e-11 * scale**3,
    )  # fmt: skip
    torch.testing.assert_close(operator.power(0).dense(), torch.eye(dim, dtype=torch.float64).expand(2, dim, dim))


def test_T_is_the_formula_of_the_method():
    directions, betas = factors((), 5, 4, seed=3)
    K = directions.T
    T = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + torch.diag(betas) @ (K.T @ K).tril(-1)) @ torch.diag(betas)
    operator = composed(directions, betas)
    torch.testing.assert_close(operator.K, K)
    torch.testing.assert_close(operator.T, T)
    assert torch.equal(operator.T, operator.T.tril())


def test_the_first_of_the_list_acts_first():
    first = DeltaOperator(torch.tensor([1.0, 0.0]), torch.tensor(1.0))
    second = DeltaOperator(torch.tensor([0.6, 0.8]), torch.tensor(2.0))
    x = torch.tensor([[2.0, 5.0]])
    # The projection clears the first coordinate, then (0, 5) is reflected: (0, 5) - 2 * 4 * (0.6, 0.8).
    torch.testing.assert_close(DeltaOperator.compose([first, second]).apply(x), torch.tensor([[-4.8, -1.4]]))
    assert not torch.allclose(DeltaOperator.compose([second, first]).apply(x), torch.tensor([[-4.8, -1.4]]))


def test_composed_operators_compose():
    directions, betas = factors((2,), 5, 6, seed=4)
    singles = [DeltaOperator(k, beta) for k, beta in zip(directions, betas, strict=True)]
    inverse = DeltaOperator.compose(singles[1:3]).inverse()
    parts = [DeltaOperator.compose(singles[:3]), inverse, DeltaOperator.compose(singles[3:]).power(2), singles[0]]
    dense = functools.reduce(lambda done, part: part.dense() @ done, parts, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(DeltaOperator.compose(parts).dense(), dense)


def test_two_reflections_are_a_rotation_with_complex_eigenvalues():
    angle = torch.tensor(0.4, dtype=torch.float64)
    k1, k2 = torch.eye(3, dtype=torch.float64)[0], torch.stack([angle.cos(), angle.sin(), angle * 0])
    two = torch.tensor(2.0, dtype=torch.float64)
    rotation = DeltaOperator.compose([DeltaOperator(k1, two), DeltaOperator(k2, two)])
    values = rotation.eigenvalues()
    assert values.dtype == torch.complex128
    assert values[0] == 1
    torch.testing.assert_close(values.imag.sort().values, torch.tensor([-1.0, 0.0, 1.0]).double() * (2 * angle).sin())
    torch.testing.assert_close(values.real.sort().values[:2], (2 * angle).cos().expand(2))
    torch.testing.assert_close(rotation.singular_values(), torch.ones(3, dtype=torch.float64))


def test_equal_reflections_cancel_to_full_precision():
    """T K^T K is defective here: its eigenvalues would be off by the square root of the machine epsilon."""
    directions, _ = factors((), 6, 1, seed=5)
    operator = composed(directions.expand(4, 6), torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(operator.eigenvalues().real, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-14)
    assert operator.effective_rank(1e-12) == 0


def test_small_singular_values_keep_their_digits():
    """Nearly projections: a Gram route (the square) would lose everything below 1e-8."""
    directions = torch.eye(4, dtype=torch.float64)[:3]
    operator = composed(directions, torch.tensor([1 - 1e-4, 1 - 1e-9, 1 - 1e-12], dtype=torch.float64))
    torch.testing.assert_close(
        operator.singular_values(), torch.tensor([1, 1e-4, 1e-9, 1e-12], dtype=torch.float64), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize(("dim", "length"), [(5, 3), (3, 5), (4, 4)])
def test_gradients(dim, length):
    directions, betas = factors((), dim, length, seed=6)
    state = torch.randn(2, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def outputs(k: Tensor, beta: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        operator = DeltaOperator.compose([DeltaOperator(k[i], beta[i], unbounded=True) for i in range(length)])
        linear = (operator.apply(x), operator.dense(), operator.inverse().apply(x), operator.power(3).dense())
        spectra = (operator.determinant(2), operator.singular_values(), operator.eigenvalues())
        # Eigenvalues of a real matrix have no stable order: only symmetric functions of them are compared.
        return (*linear, *spectra[:2], (spectra[2] ** 2).sum().real, (spectra[2].abs() ** 4).sum())

    inputs = [tensor.clone().requires_grad_() for tensor in (directions, betas, state)]
    assert gradcheck(outputs, inputs)


def test_singular_values_have_gradients_for_repeated_and_zero_directions():
    directions, betas = factors((), 4, 3, seed=7)
    directions[1], directions[2] = directions[0], 0.0
    inputs = [directions.requires_grad_(), betas.requires_grad_()]
    assert gradcheck(lambda k, b: composed(k, b).singular_values()[-1], inputs)
    ours = torch.autograd.grad(composed(*inputs).singular_values()[-1], inputs)
    dense = torch.autograd.grad(torch.linalg.svdvals(product(*inputs))[-1], inputs)
    torch.testing.assert_close(ours, dense)


def test_second_derivatives_are_exact_or_refused():
    directions, betas = factors((), 3, 2, seed=8)
    directions.requires_grad_()

    def second(value: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(value, directions, create_graph=True)
        return torch.autograd.grad(first.square().sum(), directions)[0]

    def squared_norm(matrix: Tensor) -> Tensor:
        return matrix.square().sum()

    ours, dense = (
        second(squared_norm(composed(directions, betas).dense())),
        second(squared_norm(product(directions, betas))),
    )
    torch.testing.assert_close(ours, dense)
    for spectrum in (composed(directions, betas).singular_values(), composed(directions, betas).eigenvalues().abs()):
        with pytest.raises(UserError, match="have first derivatives only"):
            second(spectrum.pow(2).sum())


def error(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_the_inverse_of_a_product_with_a_projection_names_the_entry():
    directions, betas = factors((3,), 6, 4, seed=9)
    betas = betas.clamp(max=0.9)
    betas[2, 1] = 1.0
    message = error(composed(directions, betas).inverse)
    assert message.startswith(
        "an inverse needs every singular value above rounding, so beta ||k||^2 != 1 in every factor"
    )
    assert message.endswith(" at batch entry (1,): change these gates, or compose fewer factors.")
    shrinking = composed(directions[:1, 0].expand(60, -1), torch.full((60,), 0.5, dtype=torch.float64))
    assert "compose fewer factors" in error(shrinking.inverse)


def test_effective_rank_counts_the_values_of_identity_minus_product_above_the_threshold():
    operator = composed(torch.eye(5, dtype=torch.float64)[:3], torch.tensor([0.1, 0.5, 1.5], dtype=torch.float64))
    assert [operator.effective_rank(threshold).item() for threshold in (0.0, 0.09, 0.11, 0.6, 1.6)] == [3, 3, 2, 1, 0]


def test_errors_of_compose_and_regime():
    one, other = DeltaOperator(torch.ones(2, 3), torch.ones(2)), DeltaOperator(torch.ones(3), torch.tensor(1.0))
    assert error(lambda: DeltaOperator.compose([])).startswith("compose needs at least one operator, got none")
    assert "operator 0 has (2, 3), operator 1 has (3,)" in error(lambda: DeltaOperator.compose([one, other]))
    wide = DeltaOperator(torch.ones(2, 3).double(), torch.ones(2).double())
    assert "operator 1 must have the dtype and device of operator 0" in error(
        lambda: DeltaOperator.compose([one, wide])
    )
    assert "this operator has 2 directions" in error(DeltaOperator.compose([one, one]).regime)

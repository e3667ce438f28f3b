"""The composed shortcut against products of D x D matrices and torch's dense eigenvalues and singular values."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from deepdelta.lab.audit.shortcut import Distribution, Factor, shortcut
from helpers import outer, randn, unit

D = 6


def factors(count: int, tokens: int = 5, gates: int = 1, per_residual: int = 1) -> list[Factor]:
    """Directions of any size, gates on both sides of 1."""
    return [
        Factor(
            f"r{i // per_residual}",
            (0.5 + i % 2) * unit(tokens, D, seed=i),
            2 * torch.sigmoid(2 * randn(tokens, gates, seed=50 + i)),
        )
        for i in range(count)
    ]


def dense_products(given: list[Factor]) -> list[Tensor]:
    """A_i ... A_1 for every i, (S, G, D, D)."""
    products = []
    product = torch.eye(D, dtype=torch.float64)
    for _, k, b in given:
        product = (torch.eye(D).double() - b[..., None, None] * outer(k, k)[:, None]) @ product
        products.append(product)
    return products


def farthest_from_one(values: np.ndarray, count: int) -> np.ndarray:
    """Of the last axis, the `count` that are not the trivial ones."""
    order = np.abs(values - 1).argsort(axis=-1)
    return np.take_along_axis(values, order, -1)[..., values.shape[-1] - count :]


@pytest.mark.parametrize("gates", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_spectrum_against_dense_matrices(count: int, gates: int) -> None:
    given = factors(count, gates=gates)
    found, products = shortcut(given), dense_products(given)
    nontrivial = min(D, count)
    assert (found.tokens, found.factors, found.nontrivial) == (5, count, nontrivial)
    eigenvalues = farthest_from_one(torch.linalg.eigvals(products[-1]).numpy(), nontrivial)
    assert len(found.eigenvalues) == 5 * gates * nontrivial
    complex_found = np.array([complex(*pair) for pair in found.eigenvalues]).reshape(eigenvalues.shape)
    for ours, theirs in zip(complex_found.reshape(-1, nontrivial), eigenvalues.reshape(-1, nontrivial), strict=True):
        # A characteristic polynomial does not ask for an order.
        np.testing.assert_allclose(np.poly(ours), np.poly(theirs), atol=1e-9)
    for distribution, values in (
        (found.eigenvalue_moduli, np.abs(eigenvalues)),
        (found.eigenvalue_arguments, np.abs(np.angle(eigenvalues))),
        (found.singular_values, farthest_from_one(torch.linalg.svdvals(products[-1]).numpy(), nontrivial)),
    ):
        assert distribution.mean == pytest.approx(values.mean(), abs=1e-9)
        assert distribution.least == pytest.approx(values.min(), abs=1e-9)
        assert distribution.median == pytest.approx(np.median(values), abs=1e-9)
        assert distribution.q95 == pytest.approx(np.quantile(values, 0.95), abs=1e-9)
    acting = torch.linalg.svdvals(torch.eye(D).double() - products[-1])
    expected = {"0.01": 0.01, "0.1": 0.1, "0.5": 0.5}
    assert found.effective_rank == pytest.approx(
        {key: float((acting > limit).double().sum(-1).mean()) for key, limit in expected.items()}
    )


def test_depth_counts_residuals_not_rewrites() -> None:
    given = factors(6, per_residual=2)
    found, products = shortcut(given), dense_products(given)
    assert [one.residual for one in found.depth] == ["r0", "r1", "r2"]
    for one, product in zip(found.depth, products[1::2], strict=True):
        assert one.smallest_singular_value == pytest.approx(float(torch.linalg.svdvals(product)[..., -1].median()))
        acting = torch.linalg.svdvals(torch.eye(D).double() - product)
        assert one.effective_rank == pytest.approx(float((acting > 0.1).double().sum(-1).mean()))


@pytest.mark.parametrize(
    ("beta", "modulus", "argument", "rank"), [(0.0, 1.0, 0.0, 0.0), (1.0, 0.0, None, 1.0), (2.0, 1.0, math.pi, 1.0)]
)
def test_identity_projection_and_reflection(beta: float, modulus: float, argument: float | None, rank: float) -> None:
    found = shortcut([Factor("only", unit(4, D), torch.full((4, 1), beta).double())])
    assert found.eigenvalue_moduli.median == pytest.approx(modulus, abs=1e-12)
    if argument is not None:
        assert found.eigenvalue_arguments.median == pytest.approx(argument)
    assert found.effective_rank["0.5"] == rank
    assert found.depth[0].smallest_singular_value == pytest.approx(modulus, abs=1e-12)


def test_directions_of_zero_leave_everything() -> None:
    given = [Factor(name, torch.zeros(3, D), torch.ones(3, 1)) for name in ("a", "b")]
    found = shortcut(given)
    assert found.singular_values.least == found.singular_values.greatest == 1
    assert found.effective_rank == {"0.01": 0, "0.1": 0, "0.5": 0}
    assert found.eigenvalues == ((1.0, 0.0),) * 6


def test_distribution() -> None:
    values = np.arange(101.0)[::-1].copy()
    found = Distribution.of(values)
    assert (found.least, found.q05, found.q25, found.median) == (0, 5, 25, 50)
    assert (found.q75, found.q95, found.greatest, found.mean) == (75, 95, 100, 50)

"""The method, fact by fact, through `delta_rewrite` alone, in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepdelta.ops import delta_rewrite
from helpers import dense_rewrite, near, outer, randn, unit
from strategies import BATCHES, CHANNELS, GATES, SEEDS, WIDTHS

NOT_ONE = GATES.filter(lambda beta: abs(beta - 1) > 0.05)


def sample(batch: tuple[int, ...], channels: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """State, unit direction, target."""
    return (
        randn(*batch, channels, width, seed=seed),
        unit(*batch, width, seed=seed + 1),
        randn(*batch, channels, seed=seed + 2),
    )


def full(batch: tuple[int, ...], beta: float) -> Tensor:
    return torch.full(batch, beta, dtype=torch.float64)


def shortcut(k: Tensor, beta: float) -> Tensor:
    """The D x D matrix A, column by column: what the rewrite with target 0 makes of the basis, one basis vector per
    value channel."""
    basis = torch.eye(k.shape[-1], dtype=k.dtype)
    return delta_rewrite(basis, k, torch.zeros(k.shape[-1], dtype=k.dtype), full((), beta)).T


def lifted(k: Tensor, gate: Tensor, channels: int) -> Tensor:
    """The (V D) x (V D) matrix of the rewrite with target 0, acting on whole states."""
    size = channels * k.shape[-1]
    basis = torch.eye(size, dtype=k.dtype).reshape(size, channels, -1)
    zero = torch.zeros(size, channels, dtype=k.dtype)
    return delta_rewrite(basis, k.expand(size, -1), zero, gate.expand(size, *gate.shape)).reshape(size, size).T


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_gate_zero_is_the_identity(batch, channels, width, seed):
    state, k, v = sample(batch, channels, width, seed)
    assert torch.equal(delta_rewrite(state, k, v, full(batch, 0.0)), state)


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_gate_one_overwrites_the_read(batch, channels, width, seed):
    state, k, v = sample(batch, channels, width, seed)
    new = delta_rewrite(state, k, v, full(batch, 1.0))
    near(torch.einsum("...vd,...d->...v", new, k), v)


@given(BATCHES, CHANNELS, WIDTHS, SEEDS, GATES)
def test_error_law(batch, channels, width, seed, beta):
    state, k, v = sample(batch, channels, width, seed)
    new = delta_rewrite(state, k, v, full(batch, beta))
    before, after = (torch.einsum("...vd,...d->...v", x, k) - v for x in (state, new))
    near(after, (1 - beta) * before)


@given(BATCHES, CHANNELS, WIDTHS, SEEDS, GATES)
def test_confinement(batch, channels, width, seed, beta):
    """Nothing orthogonal to k is read or moved."""
    state, k, v = sample(batch, channels, width, seed)
    new = delta_rewrite(state, k, v, full(batch, beta))
    u = randn(*batch, width, seed=seed + 3)
    u = u - (u * k).sum(-1, keepdim=True) * k
    near(torch.einsum("...vd,...d->...v", new, u), torch.einsum("...vd,...d->...v", state, u))
    along = torch.einsum("...vd,...d->...v", new - state, k)
    near(new - state, outer(along, k))


@given(WIDTHS, SEEDS, GATES)
def test_spectrum(width, seed, beta):
    k = unit(width, seed=seed)
    A = shortcut(k, beta)
    near(A, A.T)
    eigenvalues = torch.linalg.eigvalsh(A)
    near(eigenvalues, torch.tensor(sorted([1.0] * (width - 1) + [1 - beta]), dtype=k.dtype))
    near(A @ k, (1 - beta) * k)
    near(torch.linalg.det(A), torch.tensor(1 - beta, dtype=k.dtype))
    singular = torch.linalg.svdvals(A).sort().values
    near(singular, torch.tensor(sorted([1.0] * (width - 1) + [abs(1 - beta)]), dtype=k.dtype))


@given(WIDTHS, SEEDS, GATES)
def test_regimes(width, seed, beta):
    k = unit(width, seed=seed)
    eye = torch.eye(width, dtype=k.dtype)
    projector, reflection = shortcut(k, 1.0), shortcut(k, 2.0)
    near(projector @ projector, projector)
    near(projector @ k, torch.zeros_like(k))
    near(reflection @ reflection, eye)
    near(reflection @ k, -k)
    # Orthogonal only at the ends: A^T A - I = -beta (2 - beta) k k^T.
    A = shortcut(k, beta)
    near((A.T @ A - eye).norm(), torch.tensor(beta * (2 - beta), dtype=k.dtype))
    assert (torch.linalg.eigvalsh(A)[0].item() < -1e-9) == (beta > 1 + 1e-9)


@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 5]), SEEDS, GATES)
def test_lifted_determinant(channels, width, seed, beta):
    k = unit(width, seed=seed)
    near(torch.linalg.det(lifted(k, full((), beta), channels)), torch.tensor((1 - beta) ** channels, dtype=k.dtype))
    gates = 2 * torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=k.dtype)
    per_channel = lifted(k, gates, channels)
    near(torch.linalg.det(per_channel), (1 - gates).prod())
    near(per_channel, torch.block_diag(*(shortcut(k, float(gate)) for gate in gates)))


@given(BATCHES, CHANNELS, WIDTHS, SEEDS, NOT_ONE)
def test_inverse(batch, channels, width, seed, beta):
    """A^-1 = I + beta / (1 - beta) k k^T is the rewrite with gate -beta / (1 - beta)."""
    state, k, v = sample(batch, channels, width, seed)
    zero = torch.zeros_like(v)
    there, back_again = full(batch, beta), full(batch, -beta / (1 - beta))
    back = delta_rewrite(delta_rewrite(state, k, zero, there), k, zero, back_again, unbounded=True)
    near(back, state)


@given(WIDTHS, SEEDS, GATES)
def test_feature_coupling(width, seed, beta):
    """(A X)_ij = lambda_i delta_ij - beta lambda_j k_i k_j for X = diag(lambda); a program holds X transposed."""
    k, scale = unit(width, seed=seed), randn(width, seed=seed + 1)
    new = delta_rewrite(torch.diag(scale), k, torch.zeros(width, dtype=k.dtype), full((), beta)).T
    for i in range(width):
        for j in range(width):
            expected = (scale[i] if i == j else 0.0) - beta * scale[j] * k[i] * k[j]
            assert math.isclose(new[i, j], expected, abs_tol=1e-12)


@given(WIDTHS, SEEDS, GATES, st.floats(0.0, 3.0))
def test_direction_of_another_norm(width, seed, beta, size):
    """The special eigenvalue is 1 - beta n with n = |k|^2, within [-1, 1] exactly for 0 <= beta n <= 2."""
    k = size * unit(width, seed=seed)
    n = float(k @ k)
    A = shortcut(k, beta)
    near(A @ k, (1 - beta * n) * k)
    near(torch.linalg.det(A), torch.tensor(1 - beta * n, dtype=k.dtype))
    if abs(beta * n - 2) > 1e-6:
        assert (torch.linalg.eigvalsh(A).abs().max().item() <= 1 + 1e-9) == (beta * n <= 2)


@given(st.integers(1, 6), WIDTHS, SEEDS)
def test_composition_is_the_compact_wy_form(count, width, seed):
    """A_L ... A_1 = I - K T K^T, T = (I + diag(beta) stril(K^T K))^-1 diag(beta); A_1 acts first."""
    K = unit(count, width, seed=seed).T
    betas = 2 * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=K.dtype)
    state = torch.eye(width, dtype=K.dtype)
    for i in range(count):
        state = delta_rewrite(state, K[:, i], torch.zeros(width, dtype=K.dtype), betas[i])
    gram = torch.tril(K.T @ K, diagonal=-1)
    T = torch.linalg.inv(torch.eye(count, dtype=K.dtype) + torch.diag(betas) @ gram) @ torch.diag(betas)
    near(state.T, torch.eye(width, dtype=K.dtype) - K @ T @ K.T)
    near(T, torch.tril(T))


def test_order_of_application_matters():
    """Two reflections turn the plane one way or the other: a test of the order, not of the value alone."""
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    two = torch.tensor([math.cos(0.3), math.sin(0.3)], dtype=torch.float64)
    turned = shortcut(two, 2.0) @ shortcut(one, 2.0)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for k in (one, two):
        x = delta_rewrite(x, k, torch.zeros(1, dtype=x.dtype), full((), 2.0))
    near(x[0], turned[:, 0])
    near(x[0], torch.tensor([math.cos(0.6), math.sin(0.6)], dtype=x.dtype))


@settings(max_examples=10)
@given(CHANNELS, WIDTHS, SEEDS, GATES)
def test_refined_steps_become_the_exact_flow(channels, width, seed, beta):
    """dX/dt = beta k (v^T - k^T X): the error is multiplied by exp(-beta), never by a number below 0."""
    state, k, v = sample((), channels, width, seed)
    before = state @ k - v
    for _ in range(500):
        state = delta_rewrite(state, k, v, full((), beta / 500))
    near(state @ k - v, before * (1 - beta / 500) ** 500)
    torch.testing.assert_close(state @ k - v, before * math.exp(-beta), rtol=5e-3, atol=1e-6)


@given(BATCHES, CHANNELS, WIDTHS, SEEDS, st.floats(-3, 3))
def test_one_gate_per_value_channel(batch, channels, width, seed, size):
    state, k, v = sample(batch, channels, width, seed)
    gate = size * randn(*batch, channels, seed=seed + 4)
    near(delta_rewrite(state, k, v, gate, unbounded=True), dense_rewrite(state, k, gate * v, gate))


@pytest.mark.parametrize("tiny", [0.0, 1e-200, 1e-30])
def test_zero_and_tiny_directions_leave_the_state_alone(tiny):
    state, k, v = sample((3,), 4, 5, 0)
    near(delta_rewrite(state, tiny * k, v, full((3,), 1.5)), state + 1.5 * outer(v, tiny * k), tol=1e-14)

"""The rewrite against dense formulas: values, all gradients, second derivatives, every form of write and erase."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from deepdelta.errors import UserError
from deepdelta.ops import delta_rewrite, rewrite
from deepdelta.ops.rewrite import reference
from helpers import dense_rewrite, near, outer, randn, same_values_and_gradients, unit
from strategies import BATCHES, CHANNELS, GATES, SEEDS, WIDTHS


def dense_delta(state: Tensor, direction: Tensor, target: Tensor, gate: Tensor) -> Tensor:
    """(I - beta k k^T) X + beta k v^T with one gate for all value channels, one D x D matrix per batch entry."""
    eye = torch.eye(direction.shape[-1], dtype=state.dtype)
    A = eye - gate[..., None, None] * outer(direction, direction)
    X_DV = state.mT  # the paper's layout
    return (A @ X_DV + gate[..., None, None] * outer(direction, target)).mT


def delta_inputs(batch: tuple[int, ...], channels: int, width: int, seed: int, beta: float) -> dict[str, Tensor]:
    return {
        "state": randn(*batch, channels, width, seed=seed),
        "direction": unit(*batch, width, seed=seed + 1),
        "target": randn(*batch, channels, seed=seed + 2),
        "gate": torch.full(batch, beta, dtype=torch.float64),
    }


@given(BATCHES, CHANNELS, WIDTHS, SEEDS, GATES)
def test_values_and_gradients_against_the_dense_formula(batch, channels, width, seed, beta):
    same_values_and_gradients(delta_rewrite, dense_delta, delta_inputs(batch, channels, width, seed, beta))


def test_the_comparison_rejects_a_rewrite_without_erase(monkeypatch):
    """The check above is worth something: it fails when the erase term is dropped, in value and in gradient."""
    whole = reference.rewrite

    def without_erase(state: Tensor, direction: Tensor, write: Tensor | float, erase: Tensor | None) -> object:
        return whole(state, direction, write, None)[0], None if erase is None else torch.zeros_like(state[..., 0])

    inputs = delta_inputs((3,), 2, 5, 0, 1.0)
    same_values_and_gradients(delta_rewrite, dense_delta, inputs)
    monkeypatch.setattr(reference, "rewrite", without_erase)
    with pytest.raises(AssertionError, match="not close"):
        same_values_and_gradients(delta_rewrite, dense_delta, inputs)


def test_the_comparison_rejects_an_erase_without_gradient(monkeypatch):
    """Right values are not enough: a read that is cut from the graph fails the same check."""
    reading = reference.read_along
    monkeypatch.setattr(reference, "read_along", lambda state, direction: reading(state, direction).detach())
    with pytest.raises(AssertionError, match="gradient of"):
        same_values_and_gradients(delta_rewrite, dense_delta, delta_inputs((3,), 2, 5, 0, 1.0))


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_per_channel_gates_against_the_dense_formula(batch, channels, width, seed):
    inputs = delta_inputs(batch, channels, width, seed, 0.0)
    inputs["gate"] = 1 + randn(*batch, channels, seed=seed + 3)

    def dense(state: Tensor, direction: Tensor, target: Tensor, gate: Tensor) -> Tensor:
        return dense_rewrite(state, direction, gate * target, gate)

    same_values_and_gradients(partial(delta_rewrite, unbounded=True), dense, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("shape", [((), 1, 1), ((2,), 3, 4), ((1, 2), 1, 5)])
def test_first_and_second_derivatives(shape, beta):
    batch, channels, width = shape
    inputs = [tensor.requires_grad_() for tensor in delta_inputs(batch, channels, width, 5, beta).values()]
    function = partial(delta_rewrite, unbounded=True)  # the finite differences step over the ends
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_the_primitive_for_any_direction(batch, channels, width, seed):
    """X + k (w - b k^T X) with k of any norm; one erase for all value channels or one each."""
    inputs = {
        "state": randn(*batch, channels, width, seed=seed),
        "direction": 3 * randn(*batch, width, seed=seed + 1),
        "write": randn(*batch, channels, seed=seed + 2),
    }
    for columns in (1, channels):
        erase = randn(*batch, columns, seed=seed + 3)
        same_values_and_gradients(
            lambda state, direction, write, erase: rewrite(state, direction, write, erase)[0],
            lambda state, direction, write, erase: dense_rewrite(state, direction, write, erase.expand(write.shape)),
            {**inputs, "erase": erase},
        )


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_erase_only(batch, channels, width, seed):
    same_values_and_gradients(
        lambda state, direction, erase: rewrite(state, direction, 0.0, erase)[0],
        lambda state, direction, erase: dense_rewrite(state, direction, torch.zeros_like(state[..., 0]), erase),
        {
            "state": randn(*batch, channels, width, seed=seed),
            "direction": randn(*batch, width, seed=seed + 1),
            "erase": randn(*batch, channels, seed=seed + 2),
        },
    )


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_one_write_for_all_value_channels(batch, channels, width, seed):
    state, k = randn(*batch, channels, width, seed=seed), randn(*batch, width, seed=seed + 1)
    erase = randn(*batch, 1, seed=seed + 2)
    every = torch.full((*batch, channels), -0.75, dtype=state.dtype)
    near(rewrite(state, k, -0.75, erase)[0], dense_rewrite(state, k, every, erase.expand(every.shape)))
    near(rewrite(state, k, -0.75)[0], state - 0.75 * k[..., None, :])


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_no_erase(batch, channels, width, seed):
    """The plain residual, bit for bit, and a write that adds without reading."""
    state, k = randn(*batch, channels, width, seed=seed), randn(*batch, width, seed=seed + 1)
    new, read = rewrite(state, k, 1.0)
    assert read is None
    assert torch.equal(new, state + k[..., None, :])
    write = randn(*batch, channels, seed=seed + 2)
    new, read = rewrite(state, k, write)
    assert read is None
    near(new, state + outer(write, k))


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_the_read_handed_back(batch, channels, width, seed):
    state, k = randn(*batch, channels, width, seed=seed), randn(*batch, width, seed=seed + 1)
    _, read = rewrite(state, k, 0.0, torch.ones(*batch, 1, dtype=state.dtype))
    near(read, (state * k[..., None, :]).sum(-1))


@given(BATCHES, CHANNELS, WIDTHS, SEEDS)
def test_scale_of_the_direction_moves_into_the_coefficients(batch, channels, width, seed):
    """k = s h: the rewrite along k with (w, b) is the rewrite along h with (s w, s^2 b)."""
    state, h = randn(*batch, channels, width, seed=seed), randn(*batch, width, seed=seed + 1)
    scale = 1 + randn(*batch, 1, seed=seed + 2)
    write, erase = randn(*batch, channels, seed=seed + 3), randn(*batch, channels, seed=seed + 4)
    along_k, _ = rewrite(state, scale * h, write, erase)
    near(rewrite(state, h, scale * write, scale * scale * erase)[0], along_k, tol=1e-9)


def test_inputs_are_left_as_they_were():
    inputs = delta_inputs((2, 3), 4, 5, 0, 1.3)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    delta_rewrite(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_strided_and_empty_inputs():
    """Views (a repeated state, transposed batch axes) and a batch of none."""
    repeated = randn(2, 3, 1, 5).expand(2, 3, 4, 5)
    k, v, gate = (
        unit(3, 2, 5, seed=1).transpose(0, 1),
        randn(4, 2, 3, seed=2).permute(1, 2, 0),
        randn(3, 2, seed=3).sigmoid().T,
    )
    near(delta_rewrite(repeated, k, v, gate), dense_delta(repeated, k, v, gate))
    empty = delta_rewrite(torch.empty(0, 4, 5), torch.empty(0, 5), torch.empty(0, 4), torch.empty(0))
    assert empty.shape == (0, 4, 5)


def changed(**changes: Tensor) -> Callable[[], Tensor]:
    inputs = delta_inputs((2, 3), 4, 5, 0, 1.0)
    return lambda: delta_rewrite(**{**inputs, **changes})


F64 = torch.float64
ERRORS = [
    (
        changed(state=torch.zeros(5, dtype=F64)),
        r"state must have shape (..., value channels, width), got (5,).",
    ),
    (
        changed(direction=torch.zeros(2, 3, 4, dtype=F64)),
        "direction must have shape (2, 3, 5) for a state of shape (2, 3, 4, 5) (..., value channels, width), "
        "got (2, 3, 4); reshape or expand it.",
    ),
    (
        changed(direction=torch.zeros(5, dtype=F64)),
        "direction must have shape (2, 3, 5) for a state of shape (2, 3, 4, 5) (..., value channels, width), "
        "got (5,); reshape or expand it.",
    ),
    (
        changed(target=torch.zeros(2, 3, 5, dtype=F64)),
        "target must have shape (2, 3, 4) for a state of shape (2, 3, 4, 5) (..., value channels, width), "
        "got (2, 3, 5); reshape or expand it.",
    ),
    (
        changed(gate=torch.zeros(2, 3, 1, dtype=F64)),
        "gate must have shape (2, 3) or (2, 3, 4) for a state of shape (2, 3, 4, 5) (..., value channels, width), "
        "got (2, 3, 1); reshape or expand it.",
    ),
    (
        changed(target=torch.zeros(2, 3, 4)),
        "target must have the state's dtype and device (torch.float64, cpu), got torch.float32, cpu; "
        "convert it with target.to(state).",
    ),
    (
        changed(gate=torch.zeros(2, 3, dtype=F64, device="meta")),
        "gate must have the state's dtype and device (torch.float64, cpu), got torch.float64, meta; "
        "convert it with gate.to(state).",
    ),
    (
        changed(gate=torch.tensor([[1.0, 2.5, 0.0], [1.0, 1.0, -0.1]], dtype=F64)),
        "gate must lie in [0, 2], got 2.5 at batch entries (0, 1), (1, 2): clamp it, or pass unbounded=True to study "
        "other gates.",
    ),
    (
        changed(gate=torch.full((2, 3), float("nan"), dtype=F64)),
        "gate must lie in [0, 2], got nan at batch entries (0, 0), (0, 1), (0, 2), (1, 0), (1, 1) and 1 more: clamp "
        "it, or pass unbounded=True to study other gates.",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[f"case{i}" for i in range(len(ERRORS))])
def test_messages(unchecked, call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value) == message


def test_any_gate_where_it_is_asked_for_and_in_compiled_code(unchecked):
    inputs = delta_inputs((2, 3), 4, 5, 0, 2.5)
    expected = dense_delta(**inputs)
    near(delta_rewrite(**inputs, unbounded=True), expected)
    near(torch.compile(delta_rewrite, fullgraph=True, backend="eager")(**inputs), expected)
    near(torch.vmap(partial(delta_rewrite, unbounded=True))(*inputs.values()), expected)

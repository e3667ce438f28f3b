"""The rewrite across value channels: its start, its operator, its edges, and the ways in which it runs."""

import math

import pytest
import torch
from torch import Tensor

from deepdelta import (
    GPT,
    DeltaOperator,
    DeltaResidual,
    DeltaStream,
    GPTConfig,
    Intervention,
    ResidualConfig,
    RewriteRecord,
    intervening,
    recording,
    use_backend,
    use_memory,
)
from deepdelta.nn.parts.target import ChannelWrite
from helpers import dense_residual, near, perturb, randn

V, D = 4, 6
IDS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))


def gpt(**options: str) -> GPT:
    residual = ResidualConfig(**({"rule": "channels"} | options))
    return GPT(GPTConfig(vocab_size=11, dim=8, heads=2, layers=3, context=7, residual=residual), seed=1).double()


def residual_of(perturbed: bool = True) -> DeltaResidual:
    residual = DeltaStream(D, V, "channels", seed=0).wrap().double()
    if perturbed:
        perturb(residual)
    return residual


def operators(records: list[RewriteRecord]) -> DeltaOperator:
    (record,) = records
    return DeltaOperator(record.direction, record.erase.squeeze(-1), unbounded=True)


@pytest.mark.parametrize("compression", ["channel", "channel_conv", "token"])
def test_it_starts_as_the_plain_residual_and_learns(compression: str) -> None:
    """And its value channels are not alike to what follows, or they would stay equal."""
    model, plain = gpt(compression=compression), gpt(rule="additive")
    own = model.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    near(model(IDS).logits, plain(IDS).logits, 1e-12)
    read = own["stream.readout.weight" if compression == "channel" else "stream.readout.read"]
    assert len(read.unique(dim=0)) > 1
    model(IDS, IDS).loss.backward()
    still = {name for name, p in model.named_parameters() if not p.grad.any()}
    assert still == {name for name in own if ".gate.outer." in name and "branch" not in name}


@torch.no_grad()
def test_a_step_of_training_makes_the_value_channels_differ() -> None:
    residual, state = residual_of(False), randn(1, D).expand(3, V, D)
    assert residual.open(state)[1](randn(3, D)).var(dim=-2).max() < 1e-28
    perturb(residual)
    assert residual.open(state)[1](randn(3, D)).var(dim=-2).min() > 1e-6


@pytest.mark.parametrize("gate", [None, 0.0, 0.5, 1.0, 2.0])
@torch.no_grad()
def test_without_a_write_it_is_the_operator_of_k_and_b(gate: float | None) -> None:
    """V x V, applied to the transposed state; for b in [0, 2] no state grows."""
    residual, state, records = residual_of(), randn(5, V, D), list[RewriteRecord]()
    with intervening(residual, {"": Intervention(gate=gate)}), recording(residual, lambda _, one: records.append(one)):
        new = residual.open(state)[1](torch.zeros(5, D, dtype=state.dtype))
    operator = operators(records)
    near(new, operator.apply(state.mT).mT)
    near(records[0].direction.norm(dim=-1), torch.ones(5, dtype=state.dtype))
    if gate is not None:
        near(operator.eigenvalues()[:, -1], torch.full((5,), 1 - gate, dtype=state.dtype))
        near(operator.singular_values().amax(-1), torch.ones(5, dtype=state.dtype))
        assert (new.norm(dim=(-2, -1)) <= state.norm(dim=(-2, -1)) + 1e-12).all()


@torch.no_grad()
def test_the_record_is_that_of_the_transposed_state() -> None:
    residual, state, h, records = residual_of(), randn(5, V, D), randn(5, D, seed=1), list[RewriteRecord]()
    with recording(residual, lambda _, one: records.append(one)):
        new = residual.open(state)[1](h)
    (record,) = records
    assert record.beta.equal(record.erase) and record.target is None
    near(record.read, torch.einsum("nv,nvd->nd", record.direction, state))
    near(record.state_norm, state.norm(dim=-2))
    near(record.cosine, record.read / state.norm(dim=-2))
    row = record.write - record.erase * record.read
    near(new, state + record.direction[..., None] * row[:, None])
    near(new, residual.open(state)[1](h), 0.0)


@torch.no_grad()
def test_interventions() -> None:
    """No erase: also what gate='constant' with gate_init=0 trains, the control."""
    residual, state, h = residual_of(), randn(5, V, D), randn(5, D, seed=1)
    own = dict(residual.named_parameters())

    def changed(**parts: float | bool) -> Tensor:
        with intervening(residual, {"": Intervention(**parts)}):
            return residual.open(state)[1](h)

    control = DeltaStream(D, V, "channels", gate="constant", gate_init=0.0, seed=0).wrap().double()
    control.load_state_dict({name: own[name] for name in control.state_dict()})
    near(changed(erase=False), control.open(state)[1](h), 1e-12)
    near(changed(erase=False), changed(gate=0.0), 1e-12)
    near(changed(write=False), residual.open(state)[1](torch.zeros_like(h)), 1e-12)
    assert changed(erase=False, write=False).equal(state)
    closed = own | {"gate.opening": torch.ones(1).double(), "gate.outer.weight": torch.zeros(1, D).double()}
    closed |= {"gate.outer.bias": torch.zeros(1).double()}
    near(changed(gate=1.0), dense_residual(residual.config, closed, state, lambda c: h), 1e-9)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 1.0])
def test_a_tiny_k_is_defined_in_value_and_gradient(size: float) -> None:
    """k = u / max(|u|, eps), where tanh has left u = 1 + tanh(W_k c) almost nothing."""
    part = ChannelWrite(ResidualConfig(rule="channels"), D).double()
    c = torch.ones(D, dtype=torch.float64, requires_grad=True)
    part.map.weight.data.fill_(math.atanh(size - 1) / D if size else -100.0)
    k, w = part(c)
    # |u| = sqrt(V) size.
    torch.testing.assert_close(k, torch.full_like(k, size / max(2 * size, part.eps)), rtol=1e-6, atol=0)
    (k.sum() + w.sum()).backward()
    assert c.grad.isfinite().all() and part.map.weight.grad.isfinite().all()


def gradients(model: GPT) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, IDS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_fused_step_writes_its_row() -> None:
    pytest.importorskip("numba")
    model = gpt()
    perturb(model)
    logits, expected = model(IDS).logits, gradients(model)
    use_backend(model, "fused")
    near(model(IDS).logits, logits, 1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("plan", ["replay", "recover"])
def test_memory_plans(plan: str, backend: str) -> None:
    model = gpt()
    perturb(model)
    use_backend(model, backend)
    expected = gradients(model)
    use_memory(model, plan, every=2)
    for name, gradient in gradients(model).items():
        if plan == "replay":
            assert torch.equal(gradient, expected[name]), name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_reads_and_rows_are_summed_in_fp32_whatever_autocast_says() -> None:
    residual, state, h = residual_of(), randn(5, V, D), randn(5, D, seed=1)
    p = {name: parameter.detach() for name, parameter in residual.named_parameters()}
    expected = dense_residual(residual.config, p, state, lambda c: h)
    residual.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = residual.open(state.float())[1](h.float())
    torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-5)
    assert residual.open(state.float())[1](h.float()).dtype == torch.float32
    low = residual.bfloat16().open(state.bfloat16())[1](h.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.1)

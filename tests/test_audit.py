"""The audit's numbers against a dense fp64 recomputation from captured states, and its losses against other models."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, GPTConfig, ResidualConfig
from deepdelta.lab.audit.audit import audit
from deepdelta.lab.audit.findings import GateAudit
from deepdelta.nn import DeltaResidual
from helpers import (
    compressed,
    dense_rewrite,
    direction_parts,
    direction_vectors,
    gate_values,
    normed,
    outer,
    perturb,
    target_values,
)

V, CONTEXT, WIDTH = 3, 6, 8
WINDOWS = torch.randint(0, 23, (5, CONTEXT + 1), generator=torch.Generator().manual_seed(3))
NAMES = ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]
WRITING = ("additive", "additive_erase", "two_gate")


def gpt(**options: Any) -> GPT:
    residual = ResidualConfig(**({"value_channels": V} | options))
    model = GPT(GPTConfig(vocab_size=23, context=CONTEXT, layers=2, heads=2, dim=WIDTH, residual=residual)).double()
    perturb(model)
    return model.eval()


def captured(model: GPT) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """State before, branch output and state after of every residual, (N T, V, D), (N T, D) and (N T, V, D)."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, part in model.named_modules():
        if isinstance(part, DeltaResidual):
            kept = found.setdefault(name, [])
            handles += [
                part.register_forward_pre_hook(lambda m, given, kept=kept: kept.append(given[0])),
                part.branch.register_forward_hook(lambda m, given, h, kept=kept: kept.append(h)),
                part.register_forward_hook(lambda m, given, new, kept=kept: kept.append(new)),
            ]
    with torch.no_grad():
        model(WINDOWS[:, :-1])
    for handle in handles:
        handle.remove()
    return {name: tuple(tensor.flatten(0, 1) for tensor in kept) for name, kept in found.items()}  # type: ignore[misc]


@dataclasses.dataclass
class Dense:
    """One residual by the formulas of the method, tokens first; lists have one entry per rewrite."""

    state: Tensor
    new: Tensor
    k: list[Tensor]
    beta: list[Tensor | None]
    b: list[Tensor]
    erased: list[Tensor]
    written: list[Tensor]
    before: list[Tensor | None]
    after: list[Tensor | None]
    cosine: list[Tensor]


def in_blocks(h: Tensor, count: int) -> list[Tensor]:
    """h once for each block of its width, the numbers of the others 0."""
    return [*(torch.eye(count, dtype=h.dtype).repeat_interleave(h.shape[-1] // count, 1)[:, None] * h)]


def dense(model: GPT, name: str, state: Tensor, h: Tensor) -> Dense:
    residual = model.get_submodule(name)
    config, p = residual.config, {key: value.detach() for key, value in residual.named_parameters()}
    x_in = compressed(config, p, state)
    c = normed(config, p, x_in)
    found = Dense(state, state, [], [], [], [], [], [], [], [])
    writing, none = config.rule in WRITING, [None] * config.rewrites
    vectors = in_blocks(h, config.erase_blocks) if writing else direction_vectors(config, p, state, h)
    betas: list[Any] = (
        none
        if config.rule == "additive"
        else gate_values(config, p, c, "gate", config.gate_init)
        if (config.rule != "additive_erase")
        else gate_values(config, p, c, "erase_gate", config.erase_init)
    )
    targets: list[Any] = none
    if config.rule in ("delta", "write_only"):
        targets = target_values(config, p, x_in, c, h, vectors)
    for a, beta, target in zip(vectors, betas, targets, strict=True):
        k, along = direction_parts(config, a)
        ones = torch.ones_like(found.new[..., 0])
        b = 0 * ones if config.rule in ("additive", "write_only") else beta
        if config.rule == "two_gate":
            b = gate_values(config, p, c, "erase_gate", config.erase_init)[0]
        matrix = torch.zeros_like(found.new)
        if writing:
            by = c.shape[-1] ** -0.5 if config.plain_start else 1
            w_h = 1 + by * c @ p["write.map.weight"].T if "write.map.weight" in p else ones
            matrix = outer((beta if config.rule == "two_gate" else ones) * w_h, a)
        elif target is not None:
            matrix = outer(beta * target, along)
        read = torch.einsum("nvd,nd->nv", found.new, k)
        found.cosine.append(read / (found.new.norm(dim=-1) * k.norm(dim=-1, keepdim=True)))
        found.k.append(k)
        found.beta.append(beta)
        found.b.append(b)
        found.erased.append(outer(b * read, k))
        found.written.append(matrix)
        new = dense_rewrite(found.new, k, 0 * b, b) + matrix
        # The operator form holds a^T X against v; k = s a, so both sides are smaller by s.
        v = None if target is None else target * (along.norm(dim=-1) / k.norm(dim=-1)).unsqueeze(-1)
        found.before.append(None if v is None else read - v)
        found.after.append(None if v is None else torch.einsum("nvd,nd->nv", new, k) - v)
        found.new = new
    return found


def rms(share: Tensor) -> float:
    return share.square().mean().sqrt().item()


def same_gate(found: GateAudit | None, betas: Sequence[Tensor | None], strength: Sequence[Tensor | None]) -> None:
    if found is None:
        assert betas[0] is None
        return
    values, strengths = (torch.cat([one.flatten() for one in many if one is not None]) for many in (betas, strength))
    assert found.values.mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert found.values.q05 == pytest.approx(values.quantile(0.05).item(), abs=1e-5)
    assert found.values.greatest == pytest.approx(values.max().item(), abs=1e-6)
    # The bins at the ends hold what lies beyond them.
    edges = [-math.inf, *(0.1 * i for i in range(1, 20)), math.inf]
    counts = [((values >= low) & (values < high)).double().mean().item() for low, high in itertools.pairwise(edges)]
    assert [count / max(1, sum(found.histogram)) for count in found.histogram] == pytest.approx(counts)
    expected = {
        "skip": (strengths >= 0) & (strengths < 0.1),
        "under_relaxed": (strengths >= 0.1) & (strengths < 0.9),
        "project": (strengths >= 0.9) & (strengths <= 1.1),
        "over_relaxed": (strengths > 1.1) & (strengths <= 1.9),
        "reflect": (strengths > 1.9) & (strengths <= 2),
        "unstable": (strengths < 0) | (strengths > 2),
    }
    fractions = {name: where.double().mean().item() for name, where in expected.items()}
    assert dataclasses.asdict(found.regimes) == pytest.approx(fractions)
    assert sum(dataclasses.asdict(found.regimes).values()) == pytest.approx(1)


RULES = ("delta", "write_only", "erase_only", "additive", "additive_erase", "two_gate")
VARIANTS: list[dict[str, Any]] = [
    *({"rule": rule} for rule in RULES),
    *({"rule": rule, "value_channels": 1} for rule in RULES),
    {"gate_per_channel": True},
    {"gate_per_channel": True, "rule": "two_gate"},
    {"rank": 2, "gate_per_channel": True},
    {"rank": 3, "rule": "write_only"},
    {"direction_norm": "operator", "direction_eps": 0.5},
    {"direction_norm": "operator", "direction_eps": 0.5, "rank": 2, "target": "magnitude"},
    {"direction_norm": "bounded"},
    {"direction_norm": "free"},
    {"rule": "additive_erase", "plain_start": True},
    {"rule": "additive_erase", "erase_blocks": 2},
    {"rule": "additive_erase", "erase_blocks": 2, "value_channels": 1, "gate_range": 1},
    {"direction": "pooled", "target": "branch", "direction_hidden": 4},
    {"expansion": "embedding_conv", "compression": "channel_conv", "compression_kernel": 2},
    {"direction_eps": 0.5},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_number_against_a_dense_recomputation(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepdelta.lab.audit.audit.INTERVENTIONS", {})  # the losses have tests of their own
    model = gpt(**options)
    if model.config.residual.plain_start:  # a factor below zero, which the start's gates in [0, 2] never have
        model.layers[0].mlp.erase_gate.opening.data.fill_(-0.7)
    found = audit(model, WINDOWS, batch_size=2, sample=10**6)
    config = model.config.residual
    assert [one.name for one in found.residuals] == NAMES
    assert (found.tokens, found.windows, found.window) == (30, 5, 6)
    product = torch.eye(WIDTH, dtype=torch.float64)
    for one, (name, (state, h, new)) in zip(found.residuals, captured(model).items(), strict=True):
        expected = dense(model, name, state, h)
        torch.testing.assert_close(expected.new, new, rtol=1e-9, atol=1e-9)
        # The formulas have one number per value channel; the gate may be one for all.
        columns = config.value_channels if config.gate_per_channel else 1
        betas = [None if beta is None else beta[:, :columns] for beta in expected.beta]
        bs = [b[:, :columns] for b in expected.b]
        strength = [b * k.square().sum(-1, keepdim=True) for b, k in zip(bs, expected.k, strict=True)]
        if config.rule == "two_gate":
            same_gate(one.gate, betas, betas)
            same_gate(one.erase_gate, bs, strength)
        else:
            same_gate(one.gate, betas, betas if config.rule == "write_only" else strength)
            assert one.erase_gate is None
        size = state.flatten(1).norm(dim=1)
        change = torch.stack([w - e for w, e in zip(expected.written, expected.erased, strict=True)]).sum(0)
        assert one.changed == pytest.approx(rms((new - state).flatten(1).norm(dim=1) / size), rel=1e-6)
        assert one.changed == pytest.approx(rms(change.flatten(1).norm(dim=1) / size), rel=1e-6)
        for share, parts, there in (
            (one.erased, expected.erased, config.erases),
            (one.written, expected.written, config.rule != "erase_only"),
        ):
            if there:
                assert share == pytest.approx(rms(torch.stack(parts).sum(0).flatten(1).norm(dim=1) / size), rel=1e-5)
            else:
                assert share is None
        cosines = torch.stack(expected.cosine)
        assert one.cosine.mean == pytest.approx(cosines.mean().item(), abs=1e-6)
        assert one.cosine.q75 == pytest.approx(cosines.quantile(0.75).item(), abs=1e-6)
        assert one.absolute_cosine == pytest.approx(cosines.abs().mean().item(), rel=1e-6)
        assert one.direction_norm == pytest.approx(torch.stack(expected.k).norm(dim=-1).mean().item(), rel=1e-6)
        if expected.before[0] is None:
            assert one.discrepancy is None
        else:
            before, after = torch.stack(expected.before), torch.stack(expected.after)  # type: ignore[arg-type]
            assert one.discrepancy is not None
            assert one.discrepancy.rms_before == pytest.approx(rms(before), rel=1e-6)
            assert one.discrepancy.rms_after == pytest.approx(rms(after), rel=1e-6)
            ratio = ((before * after).sum() / before.square().sum()).item()
            assert one.discrepancy.signed_ratio == pytest.approx(ratio, rel=1e-5, abs=1e-9)
        for b, k in zip(bs, expected.k, strict=True):
            product = (torch.eye(WIDTH).double() - b[..., None, None] * outer(k, k)[:, None]) @ product
    if not config.erases:
        assert found.shortcut is None
        return
    assert found.shortcut is not None
    assert found.shortcut.tokens == 30 and found.shortcut.factors == 4 * config.rewrites
    singular = torch.linalg.svdvals(product)[..., -1]
    last = found.shortcut.depth[-1]
    assert last.residual == NAMES[-1]
    assert last.smallest_singular_value == pytest.approx(singular.median().item(), rel=1e-4, abs=1e-7)
    acting = torch.linalg.svdvals(torch.eye(WIDTH).double() - product)
    assert last.effective_rank == pytest.approx((acting > 0.1).double().sum(-1).mean().item())
    trivial = (WIDTH - found.shortcut.nontrivial) * product[..., 0, 0].numel()
    trace = sum(real for real, _ in found.shortcut.eigenvalues) + trivial
    assert trace == pytest.approx(product.diagonal(dim1=-2, dim2=-1).sum().item(), rel=1e-5)


def test_across_value_channels_the_shortcut_is_v_by_v(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepdelta.lab.audit.audit.INTERVENTIONS", {})
    model, product = gpt(rule="channels"), torch.eye(V, dtype=torch.float64)
    found = audit(model, WINDOWS, batch_size=2, sample=10**6)
    for one, (name, (state, _, new)) in zip(found.residuals, captured(model).items(), strict=True):
        assert one.changed == pytest.approx(rms((new - state).flatten(1).norm(dim=1) / state.flatten(1).norm(dim=1)))
        residual = model.get_submodule(name)
        x_in = (residual.compression.weight * state).sum(-2)
        c = x_in / (x_in.square().mean(-1, keepdim=True) + 1e-5).sqrt() * residual.norm.weight
        u = 1 + torch.tanh(c @ residual.channels.map.weight[:V].T)
        b = residual.gate.opening * 2 * torch.sigmoid(c @ residual.gate.outer.weight.T + residual.gate.outer.bias)
        product = (torch.eye(V).double() - b[..., None] * outer(u, u) / u.square().sum(-1)[:, None, None]) @ product
    assert found.shortcut is not None and found.shortcut.nontrivial == V
    smallest = torch.linalg.svdvals(product.detach())[..., -1].median().item()
    assert found.shortcut.depth[-1].smallest_singular_value == pytest.approx(smallest, rel=1e-5)


def test_the_sample_is_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 tokens 7: those at i * 30 // 7, in the order of the text, whatever the batches."""
    monkeypatch.setattr("deepdelta.lab.audit.audit.INTERVENTIONS", {})
    given: list[Any] = []
    monkeypatch.setattr("deepdelta.lab.audit.audit.shortcut", lambda factors: given.append(factors))
    model = gpt()
    audit(model, WINDOWS, batch_size=2, sample=7)
    states = captured(model)
    for factor, name in zip(given[0], NAMES, strict=True):
        expected = dense(model, name, *states[name][:2])
        chosen = [i * 30 // 7 for i in range(7)]
        assert factor.residual == name
        torch.testing.assert_close(factor.direction, expected.k[0][chosen])
        torch.testing.assert_close(factor.erase, expected.b[0][chosen, :1])

"""Interventions: against models whose rule is another one, against the dense formula, and what they leave alone."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta import (
    GPT,
    DeltaResidual,
    DeltaStream,
    GPTConfig,
    Intervention,
    ResidualConfig,
    UserError,
    intervening,
    recording,
    use_backend,
    use_memory,
)
from deepdelta.decoding import DecodingCache
from helpers import compressed, dense_rewrite, gate_values, near, normed, perturb, randn, target_values

D, V = 5, 3
IDS = torch.randint(0, 23, (2, 6), generator=torch.Generator().manual_seed(3))
NAMES = ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]
CUT_ERASE, CUT_WRITE = Intervention(erase=False), Intervention(write=False)


def gpt(**options: Any) -> GPT:
    sizes = GPTConfig(vocab_size=23, context=6, layers=2, heads=2, dim=8, residual=ResidualConfig(**options))
    model = GPT(sizes).double().eval()
    perturb(model)
    return model


def changed(model: GPT, **options: Any) -> GPT:
    """The same weights under another rule or gate, as far as that has a place for them."""
    residual = dataclasses.replace(model.config.residual, **options)
    other = GPT(dataclasses.replace(model.config, residual=residual)).double().eval()
    own = model.state_dict()
    assert set(other.state_dict()) <= set(own)
    other.load_state_dict({name: own[name] for name in other.state_dict()})
    return other


def everywhere(model: GPT, intervention: Intervention, names: list[str] = NAMES) -> Tensor:
    with torch.no_grad(), intervening(model, dict.fromkeys(names, intervention)):
        return model(IDS).logits


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("channels", [1, V])
@pytest.mark.parametrize(
    ("rule", "intervention", "other"),
    [
        ("delta", CUT_ERASE, {"rule": "write_only"}),
        ("delta", CUT_WRITE, {"rule": "erase_only"}),
        ("additive_erase", CUT_ERASE, {"rule": "additive"}),
        *(
            (rule, Intervention(gate=g), {"gate": "constant", "gate_init": g, "erase_init": g})
            for rule in ("delta", "write_only", "erase_only", "additive_erase")
            for g in (0.0, 1.0, 2.0)
        ),
    ],
    ids=str,
)
def test_a_model_whose_rule_is_the_other_one(
    rule: str, intervention: Intervention, other: dict[str, Any], channels: int
) -> None:
    model = gpt(rule=rule, value_channels=channels)
    plain, expected = logits(model), logits(changed(model, **other))
    near(everywhere(model, intervention), expected)
    assert (plain - expected).abs().max() > 1e-4, "the two rules agree here, so this shows nothing"
    assert torch.equal(logits(model), plain), "nothing is left of it outside"


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"rank": 2, "rule": "write_only"},
        {"direction_norm": "operator", "direction_eps": 0.5},
        {"direction_norm": "free"},
        {"direction_norm": "bounded", "target": "magnitude"},
        {"gate": "two_layer", "gate_hidden": 3},
    ],
    ids=str,
)
def test_clamped_gates_of_other_settings(options: dict[str, Any]) -> None:
    model = gpt(value_channels=V, **options)
    expected = logits(changed(model, gate="constant", gate_init=1.5))
    near(everywhere(model, Intervention(gate=1.5)), expected)


@pytest.mark.parametrize("gate", [None, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "two_gate"},
        {"rule": "two_gate", "value_channels": 1},
        {"rule": "two_gate", "gate_per_channel": True},
        {"rule": "additive_erase", "plain_start": True},
        {"gate_per_channel": True},
    ],
    ids=str,
)
def test_against_the_dense_formula(options: dict[str, Any], erase: bool, write: bool, gate: float | None) -> None:
    stream = DeltaStream(D, seed=0, **({"rule": "delta", "value_channels": V} | options))
    residual = stream.wrap().double()
    perturb(residual)
    config, p = residual.config, {name: value.detach() for name, value in residual.named_parameters()}
    state, h = randn(2, 4, config.value_channels, D), randn(2, 4, D, seed=1)
    x_in = compressed(config, p, state)
    c = normed(config, p, x_in)
    size = (h.square().sum(-1, keepdim=True) + config.direction_eps**2).sqrt()

    def part(name: str, start: float) -> Tensor:
        return gate_values(config, p, c, name, start)[0]

    b = part("gate", config.gate_init) if config.rule == "delta" else part("erase_gate", config.erase_init)
    b = b if gate is None else torch.full_like(b, gate)
    if config.rule == "delta":
        w = b * target_values(config, p, x_in, c, h, [h])[0]
    else:
        by = c.shape[-1] ** -0.5 if config.plain_start else 1
        w = size * (1 + by * c @ p["write.map.weight"].T if "write.map.weight" in p else torch.ones_like(b))
        w = part("gate", config.gate_init) * w if config.rule == "two_gate" else w
    expected = dense_rewrite(state, h / size, w if write else 0 * w, b if erase else 0 * b)
    with intervening(residual, {"": Intervention(gate=gate, erase=erase, write=write)}):
        near(residual.open(state)[1](h).detach(), expected)


def test_only_the_residuals_named_are_replaced() -> None:
    model = gpt(value_channels=V)
    gates: dict[str, list[Tensor]] = {}

    def look() -> list[Tensor]:
        gates.clear()
        with torch.no_grad(), recording(model, lambda name, record: gates.setdefault(name, []).append(record.beta)):
            model(IDS)
        return [gates[name][0] for name in NAMES]

    before = look()
    with intervening(model, {"layers.0.mlp": Intervention(gate=2.0)}):
        first, second, third, _ = look()
    assert first.equal(before[0])
    assert second.equal(torch.full_like(second, 2.0))
    assert not third.equal(before[2]), "what follows sees another state"
    assert all(a.equal(b) for a, b in zip(look(), before, strict=True))


def test_the_recorder_sees_the_replaced_parts() -> None:
    model, seen = gpt(value_channels=V), []
    with torch.no_grad(), intervening(model, {NAMES[0]: Intervention(gate=0.5, write=False)}):
        with recording(model, lambda name, record: seen.append(record)):
            model(IDS)
    assert (seen[0].beta == 0.5).all() and (seen[0].erase == 0.5).all() and (seen[0].write == 0).all()
    assert (seen[1].write != 0).any()
    with torch.no_grad(), intervening(model, {NAMES[0]: CUT_ERASE}), recording(model, lambda n, r: seen.append(r)):
        model(IDS)
    assert seen[4].erase is None and seen[5].erase is not None


@pytest.mark.parametrize("rule", ["additive_erase", "two_gate"])
def test_the_recorder_sees_the_gate_of_the_erase(rule: str) -> None:
    """Where it is the only gate it is `beta` too; beside a gate of the write it leaves that one alone."""
    model, seen = gpt(rule=rule, value_channels=V), []
    for intervention in (Intervention(), Intervention(gate=0.5)):
        with (
            torch.no_grad(),
            intervening(model, {NAMES[0]: intervention}),
            recording(model, lambda n, r: seen.append(r)),
        ):
            model(IDS)
    plain, clamped = seen[0], seen[4]
    assert (clamped.erase == 0.5).all()
    assert (clamped.beta == 0.5).all() if rule == "additive_erase" else clamped.beta.equal(plain.beta)
    assert clamped.write.equal(plain.write)


def test_contexts_nest_and_end_with_an_error() -> None:
    model = gpt(value_channels=V)
    plain = logits(model)
    outer_expected, inner_expected = everywhere(model, Intervention(gate=1.0)), everywhere(model, CUT_ERASE)
    with intervening(model, dict.fromkeys(NAMES, Intervention(gate=1.0))):
        with intervening(model, dict.fromkeys(NAMES, CUT_ERASE)):
            assert torch.equal(logits(model), inner_expected)
        assert torch.equal(logits(model), outer_expected)
    with pytest.raises(RuntimeError, match="stop"), intervening(model, {NAMES[1]: CUT_WRITE}):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), plain)


def test_one_that_replaces_nothing_changes_nothing() -> None:
    model = gpt(value_channels=V)
    assert torch.equal(everywhere(model, Intervention()), logits(model))


@pytest.mark.parametrize("plan", ["save", "replay", "recover"])
def test_gradients_are_those_of_the_replaced_model(plan: Any) -> None:
    model = gpt(value_channels=V)
    other = changed(model, gate="constant", gate_init=0.5)
    use_memory(model, plan, every=2)
    with intervening(model, dict.fromkeys(NAMES, Intervention(gate=0.5))):
        model(IDS, labels=IDS).loss.backward()
    other(IDS, labels=IDS).loss.backward()
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-8, atol=1e-10)
        else:
            assert ".gate." in name and (parameter.grad is None or not parameter.grad.any())


def test_the_fused_step_and_cached_decoding_honour_it() -> None:
    pytest.importorskip("numba")
    model = gpt(value_channels=V)
    expected, plain = everywhere(model, Intervention(gate=0.5), NAMES[1:3]), logits(model)
    use_backend(model, "fused")
    near(everywhere(model, Intervention(gate=0.5), NAMES[1:3]), expected, 1e-9)
    with intervening(model, dict.fromkeys(NAMES[1:3], Intervention(gate=0.5))):
        cache = DecodingCache(model, 2)
        pieces = [cache.decode(IDS[:, i : i + 1]) for i in range(6)]
    near(torch.cat(pieces, dim=1), expected, 1e-9)
    near(logits(model), plain, 1e-9)


@pytest.mark.parametrize(
    ("rule", "intervention", "reason"),
    [
        ("additive", Intervention(gate=1.0), "the rule 'additive' has no gate"),
        ("additive", CUT_ERASE, "the rule 'additive' has no erase term"),
        ("write_only", CUT_ERASE, "the rule 'write_only' has no erase term"),
        ("erase_only", CUT_WRITE, "the rule 'erase_only' has no write"),
    ],
)
def test_parts_that_a_rule_lacks_are_refused(rule: str, intervention: Intervention, reason: str) -> None:
    model = gpt(rule=rule, value_channels=1)
    assert intervention.lacking(model.config.residual) == reason
    with pytest.raises(UserError, match=reason), intervening(model, {NAMES[3]: intervention}):
        pass


def test_bad_names_and_gates_are_refused_and_nothing_is_changed() -> None:
    model = gpt(value_channels=V)
    wrong = {NAMES[0]: CUT_ERASE, "layers.0.mpl": CUT_ERASE}
    with pytest.raises(UserError, match=r"no residual 'layers.0.mpl' .* did you mean 'layers.0.mlp'"):
        with intervening(model, wrong):
            pass
    assert all(part.runtime.intervention is None for part in model.modules() if isinstance(part, DeltaResidual))
    for gate in (-0.1, 2.1, math.nan):
        with pytest.raises(UserError, match=r"gate must lie in \[0, 2\] or be None"):
            Intervention(gate=gate)

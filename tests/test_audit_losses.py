"""The audit's losses against models of another rule; its edges, and what it refuses."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, UserError, intervening, use_backend
from deepdelta.config import from_plain, to_plain
from deepdelta.lab.audit.audit import INTERVENTIONS, audit, passes
from deepdelta.lab.audit.findings import Effect, Findings
from deepdelta.lab.audit.tally import regimes
from helpers import randn
from test_audit import CONTEXT, NAMES, WIDTH, WINDOWS, V, gpt

pytestmark = pytest.mark.usefixtures("unchecked_file")


def other_rule(model: GPT, **options: Any) -> GPT:
    """The same weights under another rule or gate."""
    config = dataclasses.replace(model.config, residual=dataclasses.replace(model.config.residual, **options))
    other = GPT(config).double().eval()
    own = model.state_dict()
    other.load_state_dict({name: own[name] for name in other.state_dict()})
    return other


@torch.no_grad()
def window_losses(model: GPT) -> np.ndarray:
    log_p = model(WINDOWS[:, :-1]).logits.log_softmax(-1)
    return -log_p.gather(-1, WINDOWS[:, 1:, None]).squeeze(-1).mean(1).numpy()


def same_effect(found: Effect, changed: np.ndarray, plain: np.ndarray) -> None:
    interval = scipy.stats.ttest_rel(changed, plain).confidence_interval(0.95)
    assert found.change is not None and found.change.t_interval is not None
    own = found.change.t_interval
    assert found.loss_change == pytest.approx((changed - plain).mean(), abs=2e-6)
    assert (own.low, own.high) == pytest.approx((interval.low, interval.high), abs=4e-6)
    assert found.remark is None


def test_losses_of_models_of_another_rule() -> None:
    model = gpt()
    plain, found = window_losses(model), audit(model, WINDOWS, batch_size=2)
    assert found.loss == pytest.approx(plain.mean(), abs=1e-6)
    others = [
        *({"gate": "constant", "gate_init": g} for g in (0.0, 1.0, 2.0)),
        {"rule": "write_only"},
        {"rule": "erase_only"},
    ]
    assert [effect.intervention for effect in found.everywhere] == list(INTERVENTIONS)
    for effect, options in zip(found.everywhere, others, strict=True):
        same_effect(effect, window_losses(other_rule(model, **options)), plain)
        assert abs(effect.loss_change or 0) > 1e-3


def test_losses_with_one_sublayer_replaced() -> None:
    """A gate is shut by its own bias, a write by a target of zero."""
    model = gpt()
    plain, found = window_losses(model), audit(model, WINDOWS)
    for one in found.residuals:
        residual = model.get_submodule(one.name)
        saved = {name: value.clone() for name, value in residual.state_dict().items()}
        residual.target.map.weight.data.zero_()
        same_effect(one.effects[4], window_losses(model), plain)
        residual.load_state_dict(saved)
        residual.gate.outer.weight.data.zero_()
        residual.gate.outer.bias.data.fill_(-math.inf)
        same_effect(one.effects[0], window_losses(model), plain)
        residual.load_state_dict(saved)
    assert window_losses(model) == pytest.approx(plain, abs=0)


def test_what_a_rule_lacks_is_said_and_costs_no_pass() -> None:
    model, seen = gpt(rule="additive"), []
    found = audit(model, WINDOWS, batch_size=2, progress=lambda done, doing: seen.append((done, doing)))
    remarks = [effect.remark for effect in found.everywhere]
    assert remarks == ["the rule 'additive' has no gate"] * 3 + ["the rule 'additive' has no erase term", None]
    assert all([effect.remark for effect in one.effects] == remarks for one in found.residuals)
    assert found.everywhere[0].loss_change is None is found.everywhere[0].change
    assert found.everywhere[4].loss_change is not None
    total = 5 * passes(model.config.residual, 4)
    assert total == 5 * (1 + 4 + 1)
    assert [done for done, _ in seen][:4] == [2, 4, 5, 7] and seen[-1] == (total, "write cut, all sublayers")
    assert passes(ResidualConfig(), 4) == 1 + 5 * 5


def test_gates_that_are_shut() -> None:
    """The delta rule with beta = 0 everywhere is the identity, and shutting it again changes no loss."""
    found = audit(gpt(gate="constant", gate_init=0.0), WINDOWS)
    for one in found.residuals:
        assert one.gate is not None and one.gate.regimes.skip == 1 and one.gate.histogram == (90 // V, *[0] * 19)
        assert one.erased == one.written == one.changed == 0
        assert one.discrepancy is not None and one.discrepancy.signed_ratio == pytest.approx(1)
        assert [one.effects[n].loss_change for n in (0, 3, 4)] == [0, 0, 0]
        assert one.effects[0].change is not None and one.effects[0].change.sd == 0
    assert found.shortcut is not None
    assert found.shortcut.effective_rank == {"0.01": 0, "0.1": 0, "0.5": 0}
    assert found.shortcut.eigenvalue_moduli.least == 1


@pytest.mark.parametrize(("beta", "regime", "ratio"), [(1.0, "project", 0.0), (2.0, "reflect", -1.0)])
def test_constant_gates(beta: float, regime: str, ratio: float) -> None:
    for one in audit(gpt(gate="constant", gate_init=beta), WINDOWS).residuals:
        assert one.gate is not None and getattr(one.gate.regimes, regime) == 1
        assert one.discrepancy is not None and one.discrepancy.signed_ratio == pytest.approx(ratio, abs=1e-6)


def test_edges_of_the_regimes() -> None:
    found = regimes(np.array([-1e-6, 0, 0.0999, 0.1, 0.8999, 0.9, 1.1, 1.1001, 1.9, 1.9001, 2, 2.000001, -0.01, 2.1]))
    assert dataclasses.asdict(found) == pytest.approx(
        {"skip": 3 / 14, "under_relaxed": 2 / 14, "project": 2 / 14, "over_relaxed": 2 / 14}
        | {"reflect": 3 / 14, "unstable": 2 / 14}
    )


def test_a_state_of_zeros_has_no_shares() -> None:
    config = GPTConfig(vocab_size=23, context=CONTEXT, layers=1, heads=2, dim=WIDTH, embedding_std=0.0)
    config = dataclasses.replace(config, residual=PRESETS["paper-cc"])
    found = audit(GPT(config), WINDOWS)
    for one in found.residuals:
        assert one.erased is one.written is one.changed is None
        assert one.cosine.greatest == 0 and one.direction_norm == 0
        assert one.discrepancy is not None and one.discrepancy.signed_ratio is None
    assert found.loss == pytest.approx(math.log(23))


def test_an_intervention_that_destroys_the_loss_is_said() -> None:
    """Directions of size 1e18, targets of size 1e22: with its gates shut the model has a loss, with them open none."""
    model = gpt(gate="constant", gate_init=0.0, direction_norm="free", target="magnitude").float()
    for layer in model.layers:
        layer.mlp.branch.out.weight.data.mul_(1e18)
        layer.mlp.target.map.weight.data.mul_(1e4)
    found = audit(model, WINDOWS)
    assert found.everywhere[1] == Effect(intervention="gate 1", change=None, remark="the loss is not finite")
    assert found.everywhere[0].loss_change == 0
    assert from_plain(Findings, json.loads(json.dumps(to_plain(found), allow_nan=False))) == found


def test_batches_backends_and_modes_do_not_matter() -> None:
    pytest.importorskip("numba")
    model = gpt(rank=2).train()
    one, other = audit(model, WINDOWS, batch_size=1, sample=7), audit(model, WINDOWS, batch_size=5, sample=7)
    assert model.training
    assert one.shortcut is not None and other.shortcut is not None and one.shortcut.tokens == 7
    assert one.shortcut.eigenvalue_moduli.mean == pytest.approx(other.shortcut.eigenvalue_moduli.mean, rel=1e-9)
    assert one.residuals[2].erased == pytest.approx(other.residuals[2].erased, rel=1e-9)
    assert one.everywhere[2].loss_change == pytest.approx(other.everywhere[2].loss_change, abs=1e-6)
    use_backend(model, "fused")
    assert audit(model, WINDOWS, batch_size=5, sample=7) == other
    assert all(part.runtime.recorder is None and part.runtime.intervention is None for part in model.residuals())


def test_one_window_has_no_interval() -> None:
    found = audit(gpt(value_channels=1), WINDOWS[:1])
    change = found.everywhere[0].change
    assert change is not None and change.t_interval is None and change.sd is None


def test_an_intervention_of_the_caller_is_given_back() -> None:
    """Within the caller's own context the audit measures the model so changed, and leaves it so."""
    model = gpt()
    with intervening(model, {NAMES[0]: INTERVENTIONS["gate 2"]}):
        found = audit(model, WINDOWS)
        assert found.residuals[0].gate is not None and found.residuals[0].gate.values.least == 2
        assert model.layers[0].attention.runtime.intervention is not None
    assert model.layers[0].attention.runtime.intervention is None


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        (WINDOWS[:0], {}, r"windows must hold at least one input and its label each, got shape \(0, 7\)"),
        (WINDOWS[:, :1], {}, r"windows must hold at least one input and its label each, got shape \(5, 1\)"),
        (WINDOWS, {"sample": 0}, "sample must be at least 1, got 0"),
        (WINDOWS, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (randn(2, 20).long(), {}, "the model's context is 6 tokens, got 19"),
    ],
)
def test_bad_input(windows: Tensor, options: dict[str, int], message: str) -> None:
    model = gpt().train()
    with pytest.raises(UserError, match=message):
        audit(model, windows, **options)
    assert model.training


def test_a_model_without_finite_numbers_is_refused() -> None:
    model = gpt()
    model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="loss on this text is not finite"):
        audit(model, WINDOWS)
    model.layers[0].mlp.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"the rewrites of 'layers.0.mlp' hold numbers that are not finite"):
        audit(model, WINDOWS)
    assert all(part.runtime.recorder is None for part in model.residuals())

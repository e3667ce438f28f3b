"""The schedule, accumulation, clipping, and one AdamW step, against numbers computed here by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepdelta import GPT, GPTConfig, TrainConfig, UserError, param_groups
from deepdelta.data import batch, load_corpus
from deepdelta.training.optimizer import build_optimizer, learning_rate
from deepdelta.training.parallel import check_parallel
from deepdelta.training.ranks import Ranks
from deepdelta.training.step import training_step
from tiny_runs import config, quietly, rows, tensors, text_file


def rates(**fields: Any) -> list[float]:
    settings = TrainConfig(**fields)
    return [learning_rate(settings, step) for step in range(settings.steps)]


def test_schedule_values() -> None:
    # lr 1, floor 0.2, 4 steps of warm-up, then 5 rates along half a cosine: 0.2 + 0.8 * (1 + cos(pi * n / 4)) / 2.
    half = math.sqrt(0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half, 0.2]
    assert rates(steps=9, lr=1.0, final_lr=0.2, warmup=4) == pytest.approx(expected, rel=1e-12)


def test_schedule_at_its_edges() -> None:
    assert rates(steps=1, lr=0.3, warmup=0) == [0.3]
    assert rates(steps=2, lr=0.3, warmup=0, final_lr=0.0) == pytest.approx([0.3, 0.0], abs=1e-15)
    assert rates(steps=3, lr=0.3, warmup=3) == pytest.approx([0.1, 0.2, 0.3])
    assert rates(steps=2, lr=0.3, warmup=100) == pytest.approx([0.003, 0.006])
    assert rates(steps=3, lr=0.3, warmup=0, final_lr=1.0) == pytest.approx([0.3, 0.3, 0.3])


def test_a_constant_rate_and_its_cooldown() -> None:
    fields = {"lr": 1.0, "final_lr": 0.2, "warmup": 2, "schedule": "constant"}
    assert rates(steps=5, **fields) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])
    assert rates(steps=8, cooldown=4, **fields) == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(steps=3, cooldown=1, **fields) == pytest.approx([0.5, 1.0, 0.2])
    assert TrainConfig(steps=80, cooldown=40, warmup=20, schedule="constant").stretched(8).cooldown == 4
    assert TrainConfig(steps=3, cooldown=1, warmup=2, schedule="constant").stretched(2).cooldown == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cooldown": 3}, "cooldown must be 0 where the schedule is not 'constant', got 3"),
        ({"cooldown": -1, "schedule": "constant"}, r"cooldown must lie in \[0, 900\]"),
        ({"cooldown": 9, "schedule": "constant", "steps": 10, "warmup": 2}, r"cooldown must lie in \[0, 8\].*got 9"),
        ({"cooldown": 1, "schedule": "constant", "steps": 5}, r"cooldown must lie in \[0, 0\]"),
    ],
)
def test_a_cooldown_that_does_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**fields)


def test_the_schedule_is_what_a_run_uses(tmp_path: Path) -> None:
    settings = config(text_file(tmp_path / "t"), steps=6, lr=0.01, final_lr=0.5, warmup=2)
    quietly(settings, tmp_path / "run")
    recorded = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row]
    assert recorded == pytest.approx([0.005, 0.01, 0.01, 0.00875, 0.00625, 0.005])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors(run).items() if name.startswith("model.")}


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    source = text_file(tmp_path / "t")
    for name, changes in {"large": {"batch_size": 6}, "parts": {"batch_size": 2, "accumulate": 3}}.items():
        quietly(config(source, steps=3, **changes), tmp_path / name)
    large, parts = weights(tmp_path / "large"), weights(tmp_path / "parts")
    for name in large:
        torch.testing.assert_close(parts[name], large[name], rtol=1e-4, atol=1e-5)
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("large", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Not because nothing depends on the batch: a third of it gives other weights.
    quietly(config(source, steps=3, batch_size=2), tmp_path / "small")
    small = weights(tmp_path / "small")
    assert any((small[name] - large[name]).abs().max() > 1e-3 for name in large)


def first_gradients(settings: TrainConfig) -> tuple[GPT, list[torch.Tensor]]:
    """The model as the run starts it, and the gradients of its first batch, by plain autograd."""
    corpus = load_corpus(settings.data)
    model = GPT(replace(settings.model, vocab_size=256), seed=settings.seed)
    inputs, labels = batch(
        corpus.train, seed=settings.seed, step=0, batch_size=settings.batch_size, context=settings.model.context
    )
    loss = nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    return model, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_clipping_and_one_adamw_step(tmp_path: Path, share: float) -> None:
    """After one step from zero moments, Adam's first moment is (1 - beta_1) times the clipped gradient."""
    source = text_file(tmp_path / "t")
    model, gradients = first_gradients(config(source))
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    settings = config(source, steps=1, warmup=0, lr=0.01, clip=share * norm, betas=[0.8, 0.9], weight_decay=0.5)
    quietly(settings, tmp_path / "run")
    assert rows(tmp_path / "run")[0]["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    saved = tensors(tmp_path / "run")
    matrices, embeddings, _ = param_groups(model, 0.5)
    decayed = {id(p) for p in (*matrices["params"], *embeddings["params"])}
    assert decayed and len(decayed) < len(gradients)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        clipped = gradient * min(1.0, share)
        torch.testing.assert_close(saved[f"optimizer.{name}.exp_avg"], 0.2 * clipped, rtol=1e-4, atol=1e-7)
        kept = parameter.detach() * (1 - 0.01 * 0.5 if id(parameter) in decayed else 1.0)
        expected = kept - 0.01 * clipped / (clipped.abs() + 1e-8)
        # Where a gradient is nearly zero, its sign and so the whole step is rounding.
        sure = clipped.abs() > 1e-6
        torch.testing.assert_close(saved[f"model.{name}"][sure], expected[sure], rtol=1e-4, atol=1e-5)


def test_parameter_groups_hold_every_trained_parameter_once() -> None:
    class Exempt(nn.Module):
        weight_decay_exempt = True

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

    shared = nn.Linear(3, 3)
    frozen = nn.Linear(3, 3).requires_grad_(False)
    module = nn.ModuleDict({"a": shared, "b": shared, "gate": Exempt(), "norm": nn.LayerNorm(3), "frozen": frozen})
    matrices, embeddings, exempt = param_groups(module, 0.1)
    assert (matrices["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in matrices["params"]] == [id(shared.weight)] and not embeddings["params"]
    expected = [shared.bias, *module["gate"].parameters(), *module["norm"].parameters()]
    assert sorted(map(id, exempt["params"])) == sorted(map(id, expected))
    with pytest.raises(UserError, match="weight_decay must be at least 0, got -1"):
        param_groups(module, -1.0)


def test_what_decays_in_a_gpt() -> None:
    model = GPT(GPTConfig(vocab_size=11, context=8, layers=1, heads=2, dim=8))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, embeddings, exempt = (
        {names[id(p)] for p in group["params"]} for group in build_optimizer(model, TrainConfig()).param_groups
    )
    assert matrices | exempt == set(names.values()) - embeddings and not matrices & exempt
    assert embeddings == {"embedding.weight"}
    parts = {"attention": ("query", "key", "value", "out"), "mlp": ("gate", "up", "out")}
    assert matrices == {
        *(f"layers.0.{name}.branch.{part}.weight" for name, several in parts.items() for part in several),
        *(f"layers.0.{name}.write.map.weight" for name in parts),
    }


def iterated(values: torch.Tensor) -> torch.Tensor:
    """Singular values after five Newton-Schulz iterations from a Frobenius norm of 1."""
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return values


def test_muon_for_the_matrices_and_adamw_for_the_rest(tmp_path: Path) -> None:
    """From zero momentum the update is that of the gradient, whose singular vectors it keeps. Muon iterates in bf16,
    where small singular values are rounding."""
    source = text_file(tmp_path / "t")
    changes = {"steps": 1, "warmup": 0, "lr": 0.01, "weight_decay": 0.5, "clip": 1e6}
    model, gradients = first_gradients(config(source))
    for name in ("adamw", "muon"):
        quietly(config(source, optimizer=name, **changes), tmp_path / name)
    muon, adamw = tensors(tmp_path / "muon"), tensors(tmp_path / "adamw")
    matrices = {id(p) for p in param_groups(model, 0.5)[0]["params"]}
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        key = f"model.{name}"
        if id(parameter) not in matrices:
            assert muon[key].equal(adamw[key])
            continue
        assert f"optimizer.{name}.exp_avg" not in muon and f"optimizer.{name}.momentum_buffer" in muon
        made = (parameter.detach() * (1 - 0.01 * 0.5) - muon[key]) / (0.01 * 0.2 * max(parameter.shape) ** 0.5)
        left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
        found = (left.mT @ made.double() @ right.mT).diagonal()
        large = values > 0.3 * values.max()
        torch.testing.assert_close(found[large], iterated(values)[large], rtol=0, atol=0.06)


def test_muon_stops_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    source = text_file(tmp_path / "t")
    changes = {"optimizer": "muon", "schedule": "constant", "momentum": 0.9}
    quietly(config(source, steps=9, **changes), tmp_path / "whole")
    for steps in (4, 9):
        quietly(config(source, steps=steps, **changes), tmp_path / "parts")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups_with_rates_of_their_own(tmp_path: Path, optimizer: str) -> None:
    """What one step does to a group, without decay, is proportional to its rate."""
    source = text_file(tmp_path / "t")
    changes = {"steps": 1, "warmup": 0, "lr": 1e-3, "weight_decay": 0.0, "optimizer": optimizer}
    quietly(config(source, **changes), tmp_path / "one")
    quietly(config(source, embedding_rate=4.0, exempt_rate=0.5, **changes), tmp_path / "own")
    model, _ = first_gradients(config(source))
    one, own = tensors(tmp_path / "one"), tensors(tmp_path / "own")
    factor = {id(p): f for g, f in zip(param_groups(model, 0.0), (1.0, 4.0, 0.5), strict=True) for p in g["params"]}
    for name, start in model.named_parameters():
        key = f"model.{name}"
        expected = (one[key] - start.detach()) * factor[id(start)]
        torch.testing.assert_close(own[key] - start.detach(), expected, rtol=1e-4, atol=2e-6)


def test_a_step_that_is_not_finite_leaves_muon_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon"))
    for bad in (False, True):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss = model(torch.ones(3, 4)).square().sum() * (float("nan") if bad else 1.0)
        training_step(model, optimizer, [loss], clip=1.0, rate=0.1)
        moved = [name for name, parameter in model.named_parameters() if not parameter.equal(before[name])]
        assert moved == ([] if bad else list(before))


def test_momentum_is_refused_without_muon() -> None:
    with pytest.raises(UserError, match=r"momentum=0\.5 has no effect where optimizer is not 'muon'"):
        TrainConfig(momentum=0.5)


def test_muon_is_refused_where_matrices_are_in_parts() -> None:
    ranks = Ranks(0, 2, store=object())
    check_parallel(TrainConfig(optimizer="muon"), ranks)
    with pytest.raises(UserError, match="optimizer='muon' takes whole matrices, which parallel='fsdp' does not have"):
        check_parallel(TrainConfig(optimizer="muon", parallel="fsdp"), ranks)

"""Tasks on a byte GPT: states rounded to few bits, and the grid of settings that train."""

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, UserError
from deepdelta.data import DataConfig, load_corpus
from deepdelta.lab.tasks import landscape, load_task, rounding, texts
from deepdelta.lab.tasks.fitting import Diverged
from deepdelta.models import LanguageModel, parameter_count
from deepdelta.training.step import step_batch
from helpers import randn
from tiny_runs import nats, text_file

pytestmark = pytest.mark.usefixtures("unchecked_file")
SMALL: dict[str, Any] = {"dim": 16, "layers": 2, "context": 16, "steps": 30, "batch_size": 2, "test_tokens": 1 << 20}


def nothing(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("source") / "text.txt", words=500)


@pytest.mark.parametrize("task", ["rounding", "landscape"])
def test_every_condition_has_the_parameters_of_the_plain_one(task: str) -> None:
    named = load_task(task)
    counts = {name: parameter_count(named.settings_of(name).model(256)) for name in named.conditions}
    assert all(abs(count / counts["additive"] - 1) < 0.015 for count in counts.values()), counts


# Rounding


def numbers(form: str) -> Tensor:
    """All that the format has between -1 and 1, its largest being 1."""
    if form == "e4m3":
        # Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, the last mantissa of the last is NaN.
        values = [
            sign * (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
            for sign, e, m in itertools.product((-1, 1), range(16), range(8))
            if (e, m) != (15, 7)
        ]
        return torch.tensor(values, dtype=torch.float64) / 448
    most = {"int8": 127, "int4": 7}[form]
    return torch.arange(-most, most + 1, dtype=torch.float64) / most


@pytest.mark.parametrize("form", ["int8", "int4", "e4m3"])
def test_a_number_becomes_the_nearest_that_the_format_has(form: Any) -> None:
    scale, x = 3.7, torch.cat((1.4 * randn(2000), randn(200) * 1e-3, torch.tensor([0.0, 3.7, -3.7, 99.0])))
    found, there = rounding.rounded(x, scale, form), numbers(form) * scale
    distance = (x[:, None] - there).abs().min(1).values
    torch.testing.assert_close((found - x).abs(), distance, rtol=0, atol=1e-12)
    assert found[-1] == scale and found[-4] == 0
    # Nothing that is in the format moves.
    torch.testing.assert_close(rounding.rounded(there, scale, form), there, rtol=0, atol=1e-12)


@pytest.mark.parametrize("condition", ["additive", "default"])
def test_the_loss_rises_by_what_rounding_each_state_costs(
    condition: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[GPT] = []
    build = texts.trained

    def keep(*given: Any) -> tuple[LanguageModel, float]:
        model, rate = build(*given)
        assert isinstance(model, GPT)
        made.append(model)
        return model, rate

    monkeypatch.setattr(rounding, "trained", keep)
    task = load_task("rounding")
    settings = task.settings_of(
        condition, {**SMALL, "source": str(source), "rates": [1e-2], "calibration_tokens": 1 << 20}
    )
    found = task.run(settings, 1, nothing)
    (model,) = made
    data = DataConfig(source=str(source), held_out="train_tail")
    trained, tested = load_corpus(data).train, load_corpus(DataConfig(source=str(source))).validation

    def states(window: Tensor) -> list[Tensor]:
        state, seen = model.stream.expand(model.embedding(window)), []
        for residual in model.residuals():
            state = residual(state)
            seen.append(state)
        return seen

    windows = [trained[start : start + 16] for start in range(0, len(trained) - 16, 16)]
    with torch.no_grad():
        every = [states(torch.tensor(window.astype("int64"))[None]) for window in windows]
    largest = [max(float(seen[i].abs().max()) for seen in every) for i in range(4)]
    assert found["largest"] == pytest.approx(largest[-1], rel=1e-5)
    plain = nats(model, tested)
    assert found["loss"] == pytest.approx(sum(plain) / len(plain), abs=1e-5)

    class Rounded:
        """The model, its residuals called one after the other and rounded by looking the nearest number up."""

        config = model.config

        def __init__(self, form: str) -> None:
            self.there = numbers(form).float()

        def __call__(self, ids: Tensor) -> Any:
            state = model.stream.expand(model.embedding(ids))
            for residual, scale in zip(model.residuals(), largest, strict=True):
                state = residual(state)
                nearest = (state.clamp(-scale, scale)[..., None] / scale - self.there).abs().argmin(-1)
                state = self.there[nearest] * scale
            c_BTD = model.norm(model.stream.readout(state))
            return type("Output", (), {"logits": c_BTD @ model.embedding.weight.T})

    for form in ("int8", "int4", "e4m3"):
        each = nats(Rounded(form), tested)  # type: ignore[arg-type]
        expected = sum(each) / len(each) - sum(plain) / len(plain)
        # A number half way between two may fall to either side.
        assert found[f"rise_{form}"] == pytest.approx(expected, abs=1e-3), form
    assert found["rise"] == found["rise_int8"] and found["rise_int4"] > 3 * abs(found["rise_int8"])
    assert not any(residual._forward_hooks for residual in model.residuals())


# The grid


def test_cells_near_the_best_of_their_depth_are_counted(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {
        # depth, scale, rate
        (1, 0.1, 1e-3): 2.0, (1, 0.1, 1e-2): 2.04, (1, 0.5, 1e-3): 2.06, (1, 0.5, 1e-2): float("nan"),
        (2, 0.1, 1e-3): 3.0, (2, 0.1, 1e-2): 1.0, (2, 0.5, 1e-3): 1.05, (2, 0.5, 1e-2): None,
    }  # fmt: skip

    def trained_at(settings: Any, text: Any, seed: int, rate: float, progress: Any) -> Any:
        progress(settings.steps, settings.steps)
        if losses[settings.layers, settings.embedding_std, rate] is None:
            raise Diverged("too fast")
        return rate

    def loss_on(corpus: Any, model: Any, settings: Any) -> Any:
        return losses[settings.layers, settings.embedding_std, model]

    monkeypatch.setattr(landscape, "trained_at", trained_at)
    monkeypatch.setattr(landscape, "loss_on", loss_on)
    errors = {(1, 0.1): 0.3, (1, 0.5): 0.2, (2, 0.1): 0.4, (2, 0.5): 0.5}
    monkeypatch.setattr(
        landscape, "bf16_error", lambda settings, text, seed: errors[settings.layers, settings.embedding_std]
    )
    task = load_task("landscape")
    given = {"source": str(source), "rates": [1e-3, 1e-2], "scales": [0.1, 0.5], "depths": [1, 2]}
    steps: list[float] = []
    found = task.run(task.settings_of("additive", given), 0, lambda done, total: steps.append(done / total))
    guess = math.log(256)
    mean_1, mean_2 = (2.0 + 2.04 + 2.06 + guess) / 4, (3.0 + 1.0 + 1.05 + guess) / 4
    assert found == pytest.approx({
        "loss": (mean_1 + mean_2) / 2, "share": 1 / 2,
        "loss_d1": mean_1, "share_d1": 2 / 4, "best_d1": 2.0, "scale_d1": 0.1, "lr_d1": 1e-3, "bf16_d1": 0.3,
        "loss_d2": mean_2, "share_d2": 2 / 4, "best_d2": 1.0, "scale_d2": 0.1, "lr_d2": 1e-2, "bf16_d2": 0.5,
    })  # fmt: skip
    assert steps == [(i + 1) / 8 for i in range(8)]
    # Where nothing trained at one depth, that counts, as what a guess has; and so does what is worse than that.
    losses.update({key: None for key in losses if key[0] == 2})
    losses[1, 0.5, 1e-3] = 17.0
    found = task.run(task.settings_of("additive", given), 0, nothing)
    assert found["loss_d2"] == guess and found["share_d2"] == 0 and "best_d2" not in found
    assert found["loss_d1"] == pytest.approx((2.0 + 2.04 + 2 * guess) / 4)


@pytest.mark.parametrize("condition", ["additive", "code"])
def test_the_error_of_gradients_in_bf16(condition: str, source: Path) -> None:
    given = {key: SMALL[key] for key in SMALL if key != "layers"} | {"source": str(source)}
    settings = dataclasses.replace(load_task("landscape").settings_of(condition, given), layers=2)
    text = texts.text_of(settings)
    config, model = texts.untrained(settings, text, 3)
    inputs, labels = step_batch(config, text.trained, 0)

    def gradient(module: LanguageModel, *, narrow: bool) -> Tensor:
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logits = module(inputs).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten()
        ).backward()
        return torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])

    narrow = gradient(model, narrow=True)
    exact = gradient(copy.deepcopy(model).double(), narrow=False)
    error = float((narrow - exact).norm() / exact.norm())
    assert landscape.bf16_error(settings, text, 3) == pytest.approx(error, rel=1e-3)
    assert 1e-4 < error < 0.5


@pytest.mark.parametrize(
    ("task", "name", "other"),
    [("landscape", "layers", "depths"), ("landscape", "embedding_std", "scales"), ("loops", "lr", "rates"),
     ("rounding", "lr", "rates"), ("registers", "lr", "rates"), ("networks", "lr", "rates")],
)  # fmt: skip
def test_settings_without_effect_are_refused(task: str, name: str, other: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no effect in task {task}, where {other} takes its place"):
        load_task(task).settings_of("additive" if task != "networks" else "bare", {name: 3})


def test_every_cell_is_a_model_of_its_own(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    build = texts.language_model

    def keep(config: Any, seed: int) -> LanguageModel:
        model = build(config, seed)
        seen.append((config.layers, float(model.embedding.weight.detach().std())))
        return model

    monkeypatch.setattr(texts, "language_model", keep)
    task = load_task("landscape")
    given = {key: SMALL[key] for key in SMALL if key != "layers"} | {"steps": 2, "source": str(source)}
    small = dataclasses.replace(
        task.settings_of("normed", given),
        rates=(1e-3, 1e-2), scales=(0.02, 0.5), depths=(1, 3),
    )  # fmt: skip
    found = task.run(small, 0, nothing)
    # Those that are trained, and one of each depth and scale for its gradient in bf16.
    assert [layers for layers, _ in seen] == [1] * 4 + [3] * 4 + [1] * 2 + [3] * 2
    for (_, std), scale in zip(seen, [0.02, 0.02, 0.5, 0.5] * 2 + [0.02, 0.5] * 2, strict=True):
        assert std == pytest.approx(scale, rel=0.05)
    assert {found["lr_d1"], found["lr_d3"]} <= {1e-3, 1e-2} and 0 < found["share"] <= 1

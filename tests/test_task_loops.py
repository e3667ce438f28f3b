"""Shared depth: what is trained and asked, which rate is taken and on what text, and that sizes are equal."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdelta import GPT
from deepdelta.data import DataConfig, load_corpus
from deepdelta.lab.tasks import load_task, loops, texts
from deepdelta.lab.tasks.fitting import Diverged
from deepdelta.models import LanguageModel, parameter_count
from tiny_runs import nats, text_file

pytestmark = pytest.mark.usefixtures("unchecked_file")
TASK = load_task("loops")
SMALL: dict[str, Any] = {
    "dim": 16, "context": 16, "repeats": 3, "asked": [1, 3, 5], "steps": 4, "batch_size": 2, "test_tokens": 1 << 20
}  # fmt: skip


def nothing(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("source") / "text.txt", words=800)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[LanguageModel]:
    """The models that a run trains, in their order."""
    made: list[LanguageModel] = []
    build = texts.language_model

    def keep(*given: Any) -> LanguageModel:
        made.append(build(*given))
        return made[-1]

    monkeypatch.setattr(texts, "language_model", keep)
    return made


def test_every_condition_has_the_parameters_of_the_plain_one() -> None:
    counts = {name: parameter_count(TASK.settings_of(name).model(256)) for name in TASK.conditions}
    assert all(abs(count / counts["additive"] - 1) < 0.003 for count in counts.values()), counts
    assert all(TASK.settings_of(name).model(256).repeats == 6 for name in TASK.conditions)


@pytest.mark.parametrize("condition", ["additive", "code", "retention"])
def test_it_is_tested_at_every_number_on_text_that_it_never_saw(
    condition: str, source: Path, trained: list[LanguageModel]
) -> None:
    settings = TASK.settings_of(condition, {**SMALL, "source": str(source), "rates": [3e-3, 3e-2]})
    found = TASK.run(settings, 5, nothing)
    data = DataConfig(source=str(source))
    tail, held_out = load_corpus(dataclasses.replace(data, held_out="train_tail")), load_corpus(data).validation
    assert len(tail.train) + len(tail.validation) + len(held_out) == source.stat().st_size

    def loss(model: LanguageModel, repeats: int, ids: Any) -> float:
        model.config = dataclasses.replace(model.config, repeats=repeats)
        each = nats(model, ids)  # type: ignore[arg-type]
        return math.fsum(each) / len(each)

    # Of the rates, and those beyond an end of them that was best, the one that is better on the tail as it was trained.
    grid = [*settings.rates, 0.3, 3.0] if found["lr"] > 3e-3 else [*settings.rates, 3e-4, 3e-5]
    best = min(range(len(trained)), key=lambda number: loss(trained[number], 3, tail.validation))
    assert found["lr"] == grid[best] and len(trained) > 2
    for repeats in (1, 3, 5):
        assert found[f"loss_{repeats}"] == pytest.approx(loss(trained[best], repeats, held_out), abs=2e-5)
    assert found["loss"] == found["loss_5"]
    assert len({found[f"loss_{repeats}"] for repeats in (1, 3, 5)}) == 3


def test_fp64_tells_what_leaves_the_range_of_fp32(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a state of 1e25 the norm makes 0 in fp32, so that every byte is as likely as another."""
    train = loops.trained

    def grown(*given: Any) -> tuple[LanguageModel, float]:
        model, rate = train(*given)
        with torch.no_grad():
            model.layers[1].mlp.branch.out.weight.mul_(1e25)
        return model, rate

    found = {}
    for tested_in in ("fp32", "fp64"):
        changes = {**SMALL, "source": str(source), "rates": [1e-2], "tested_in": tested_in}
        settings = TASK.settings_of("additive", changes)
        found[tested_in] = TASK.run(settings, 5, nothing)["loss_1"]
        with monkeypatch.context() as patched:
            patched.setattr(loops, "trained", grown)
            found[f"grown {tested_in}"] = TASK.run(settings, 5, nothing)["loss_1"]
    assert found["fp32"] == pytest.approx(found["fp64"], abs=1e-5)
    assert found["grown fp32"] == pytest.approx(math.log(256), abs=1e-6)
    assert abs(found["grown fp64"] - math.log(256)) > 0.1


def test_every_step_draws_how_often_layers_are_repeated(
    source: Path, trained: list[LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int | None] = []
    forward = GPT.forward

    def counting(self: GPT, *given: Any, repeats: int | None = None, **more: Any) -> Any:
        if self.training:
            seen.append(repeats)
        return forward(self, *given, repeats=repeats, **more)

    monkeypatch.setattr(GPT, "forward", counting)
    settings = TASK.settings_of("additive", {**SMALL, "source": str(source), "rates": [1e-2], "steps": 40})
    TASK.run(settings, 5, nothing)
    first, seen[:] = list(seen), []
    TASK.run(settings, 6, nothing)
    assert set(first) == set(seen) == {1, 2, 3} and first != seen and len(first) == 40


def test_a_condition_learns_the_text(source: Path) -> None:
    settings = TASK.settings_of("default", {**SMALL, "source": str(source), "rates": [1e-2], "steps": 60})
    found = TASK.run(settings, 0, nothing)
    assert found["loss_3"] < 0.8 * math.log(256)


def test_a_rate_at_which_it_diverges_is_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, rates = texts.fit, []

    def failing(model: torch.nn.Module, loss: Any, recipe: Any, progress: Any) -> None:
        rates.append(recipe.lr)
        if recipe.lr > 5e-3 or len(rates) > 2:
            raise Diverged("too fast")
        fit(model, loss, recipe, progress)

    monkeypatch.setattr(texts, "fit", failing)
    settings = TASK.settings_of("additive", {**SMALL, "source": str(source), "rates": [1e-3, 1e-2]})
    assert TASK.run(settings, 0, nothing)["lr"] == 1e-3
    with pytest.raises(Diverged, match="no loss stayed finite at the rates"):
        TASK.run(settings, 0, nothing)

"""A residual that names a rule or a preset means the same wherever it is written: in code, in files, as options."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepdelta
from deepdelta import PRESETS, DeltaStream, GPTConfig, ResidualConfig, UserError, retrofit, retrofitted
from deepdelta.cli.options import parse
from deepdelta.config import to_plain
from deepdelta.files import write_json
from deepdelta.lab.experiments.config import load_study
from deepdelta.lab.tasks import load_task
from deepdelta.lab.tasks.task import read_overrides
from deepdelta.training import TrainConfig
from deepdelta.training.config import run_settings
from deepdelta.training.optimizer import build_optimizer
from tiny_runs import typed

pytestmark = pytest.mark.usefixtures("unchecked")

PLAIN = ResidualConfig(
    rule="additive", value_channels=1, expansion="repeat", compression="channel", compression_init="identity"
)
RESULTS = Path(__file__).parent.parent / "results"


def in_a_study(folder: Path, train: str, changes: str) -> ResidualConfig:
    head = 'name = "one"\nquestion = "?"\nbaseline = "a"\nseeds = [0]\n'
    (folder / "one.toml").write_text(f'{head}[train]\n{train}\n[conditions.a]\nsummary = "a"\n{changes}')
    return load_study(str(folder / "one.toml")).train_config("a", 0).model.residual


def toml(given: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in given.items()) + " }"


MEANINGS: list[tuple[dict[str, Any], ResidualConfig]] = [
    ({"rule": "additive"}, PLAIN),
    ({"rule": "additive", "value_channels": 3}, replace(PLAIN, value_channels=3)),
    ({"rule": "write_only", "gate_init": 0.5}, ResidualConfig(rule="write_only", value_channels=4, gate_init=0.5)),
    ({"preset": "additive"}, PLAIN),
    (
        {"preset": "plain-start", "erase_init": 0.5},
        ResidualConfig(rule="additive_erase", plain_start=True, erase_init=0.5),
    ),
    ({"preset": "paper-cc", "gate_init": 0.5}, replace(PRESETS["paper-cc"], gate_init=0.5)),
    ({"preset": "paper-cc", "rule": "additive"}, replace(PLAIN, value_channels=4, expansion="embedding_conv")),
]


@pytest.mark.parametrize(("given", "meant"), MEANINGS, ids=str)
def test_one_meaning_everywhere(
    given: dict[str, Any], meant: ResidualConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert DeltaStream(8, **given).config == meant
    text = f"model.residual = {toml(given)}"
    assert in_a_study(tmp_path, text, "") == meant
    assert in_a_study(tmp_path, "", f"changes.{text}") == meant
    # What is below, whole as in a run's config.json, takes no part.
    whole = "model.residual = { preset = 'paper-tc', norm_eps = 0.25 }"
    assert in_a_study(tmp_path, whole, f"changes.{text}") == meant
    (tmp_path / "a.toml").write_text(text)
    assert typed(monkeypatch, "--config", tmp_path / "a.toml").model.residual == meant
    options = [
        word
        for key, value in given.items()
        for word in ("--preset" if key == "preset" else f"--model.residual.{key}", str(value))
    ]
    assert typed(monkeypatch, *options).model.residual == meant
    (tmp_path / "b.toml").write_text(whole)
    assert typed(monkeypatch, "--config", tmp_path / "b.toml", *options).model.residual == meant
    if "preset" not in given:
        assert ResidualConfig(**given) == meant
    else:
        beside = {key: value for key, value in given.items() if key != "preset"}
        short = f'preset = "{given["preset"]}"\n' + (f"model.residual = {toml(beside)}" if beside else "")
        assert in_a_study(tmp_path, short, "") == meant
        assert in_a_study(tmp_path, whole, "\n".join(f"changes.{line}" for line in short.splitlines())) == meant


def test_a_residual_that_names_neither_is_laid_over_what_stands_below(tmp_path: Path) -> None:
    assert in_a_study(tmp_path, "", "") == PRESETS["ddl"] == GPTConfig().residual
    changes = "changes.model.residual = { direction_eps = 0.5 }"
    assert in_a_study(tmp_path, "", changes) == replace(PRESETS["ddl"], direction_eps=0.5)
    tokens = in_a_study(tmp_path, 'preset = "paper-tc"', changes)
    assert tokens == replace(PRESETS["paper-tc"], direction_eps=0.5)
    assert in_a_study(tmp_path, 'model.residual = { rule = "additive", norm_eps = 0.25 }', changes) == replace(
        PLAIN, norm_eps=0.25, direction_eps=0.5
    )


def test_what_the_residual_of_a_run_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed, in a file, or as a condition's changes; a file of a whole residual holds settings of every part."""
    with pytest.raises(UserError, match=r"train: gate_init has no effect on this residual \(rule='additive_erase'\)"):
        parse(["train", "RUN", "--model.residual.gate-init", "0.5"])
    with pytest.raises(UserError, match="train: gate_hidden_bias has no effect"):
        parse(["train", "RUN", "--preset", "paper-cc", "--model.residual.no-gate-hidden-bias"])
    text = "model.residual = { target = 'constant' }"
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match="train: target has no effect"):
        parse(["train", "RUN", "--config", str(tmp_path / "a.toml")])
    assert typed(monkeypatch, "--config", tmp_path / "a.toml", "--preset", "ddl").model.residual == PRESETS["ddl"]
    with pytest.raises(UserError, match="condition a: target has no effect"):
        in_a_study(tmp_path, "", f"changes.{text}")
    write_json(tmp_path / "whole.json", {"model": {"residual": to_plain(PRESETS["code-cc"])}})
    assert typed(monkeypatch, "--config", tmp_path / "whole.json").model.residual == PRESETS["code-cc"]


def test_sizes_and_starts_of_a_study_take_presets(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'name = "a"\nquestion = "?"\nbaseline = "a"\nseeds = [0]\n[train]\npreset = "ddl"\n'
        '[sizes.one]\npreset = "paper-tc"\n[sizes.two]\nmodel.dim = 64\n[extrapolate]\nflops = 1e9\n'
        '[conditions.a]\nsummary = "a"\n'
    )
    study = load_study(str(tmp_path / "a.toml"))
    found = {size: study.sized(size).train_config("a", 0).model for size in study.sizes}
    assert (found["one"].residual, found["two"].residual) == (PRESETS["paper-tc"], PRESETS["ddl"])
    (tmp_path / "a.toml").write_text(
        'name = "a"\nquestion = "?"\nbaseline = "a"\nseeds = [0]\n[start]\npreset = "additive"\n[train]\nlr = 0.5\n'
        '[conditions.a]\nsummary = "a"\nchanges.preset = "retrofit"\n'
    )
    study = load_study(str(tmp_path / "a.toml"))
    assert study.start_config(0).model.residual == PRESETS["additive"]
    assert study.start_config(0).lr == 0.5


def test_tasks_lay_their_conditions_over_a_preset() -> None:
    tabular = load_task("tabular")
    given = read_overrides(["residual.preset=code-cc-repeat", "residual.gate_init=0.5"])
    expected = replace(PRESETS["code-cc-repeat"], gate_init=0.5)
    assert tabular.settings_of("delta-4", given).residual == expected
    assert tabular.settings_of("write-only-4", given).residual == replace(expected, rule="write_only")
    assert tabular.settings_of("additive").residual == PLAIN
    with pytest.raises(UserError, match="one value channel has nothing to compress"):
        tabular.settings_of("delta", given)


def test_retrofit_takes_the_preset_that_leaves_the_function_as_it_is() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    with pytest.raises(UserError, match="the preset of a retrofit is 'retrofit', whose parts are options, got 'ddl'"):
        retrofit(model, preset="ddl")
    assert retrofitted(retrofit(model, preset="retrofit", gate="two_layer", seed=0)).config.gate == "two_layer"


def test_unknown_presets_are_named(tmp_path: Path) -> None:
    for refused in (
        lambda: DeltaStream(8, preset="dll"),
        lambda: in_a_study(tmp_path, 'preset = "dll"', ""),
        lambda: in_a_study(tmp_path, "", 'changes.model.residual.preset = "dll"'),
        lambda: load_task("tabular").settings_of("delta", read_overrides(["residual.preset=dll"])),
        lambda: retrofit(nn.Linear(1, 1), preset="dll"),
    ):
        with pytest.raises(UserError, match="there is no preset 'dll'; did you mean 'ddl'"):
            refused()
    with pytest.raises(UserError, match="there is no preset 3; known are"):
        run_settings({"preset": 3}, where="here")


@pytest.mark.parametrize("study", ["headline", "headline-tinyshakespeare", "paper-form"])
def test_the_presets_of_the_findings_and_their_rates(study: str) -> None:
    found = {
        one["name"]: one["tuned"] for one in json.loads((RESULTS / study / "results.json").read_text())["conditions"]
    }
    config = load_study(study.removesuffix("-tinyshakespeare"))
    for name in {"additive", "additive-convolution", "paper-cc", "delta-token-random"} & set(found):
        settings = config.train_config(name, config.seeds[0])
        assert settings.model.residual == PRESETS[name]
        assert settings.model.dim == 64
        assert replace(settings, lr=None).rate == pytest.approx(found[name]["lr"])


def test_what_a_run_starts_from_without_settings_of_its_own() -> None:
    """1 / sqrt(dim) for embeddings, and a rate that falls with the width."""
    for dim in (64, 256):
        config = run_settings({"preset": "additive", "model": {"dim": dim, "vocab_size": 4000, "layers": 1}}, where="")
        model = deepdelta.GPT(config.model)
        assert model.embedding.weight.std().item() == pytest.approx(dim**-0.5, rel=0.01)
        (rate,) = {group["lr"] for group in build_optimizer(model, config).param_groups}
        assert rate == pytest.approx(5e-3 * 64 / dim)
    fixed = replace(config.model, embedding_std=0.02)
    assert deepdelta.GPT(fixed).embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert torch.equal(deepdelta.GPT(fixed).layers[0].mlp.branch.up.weight, model.layers[0].mlp.branch.up.weight)


def test_a_warmup_that_reaches_the_steps_is_warned_of() -> None:
    assert TrainConfig(steps=101, warmup=100).warning is None
    warning = TrainConfig(steps=60).warning
    assert warning is not None
    assert "warmup=100 reaches steps=60" in warning and "set warmup to 6, or more steps" in warning

"""Studies as files: what ships, what is read, and what is refused before anything runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepdelta import GPT, UserError
from deepdelta.cli import main
from deepdelta.config import differences, to_plain
from deepdelta.lab.experiments.config import StudyConfig, load_study, named_studies
from deepdelta.models import parameter_count
from deepdelta.training import TrainConfig

STUDY = """
name = "mine"
question = "Does it help?"
baseline = "plain"
seeds = [3, 1]

[train]
steps = 5
model = { dim = 16, heads = 2 }

[conditions.plain]
summary = "x + F(x)"
changes.model.residual = { rule = "additive", value_channels = 1, expansion = "repeat" }

[conditions.delta]
summary = "the delta rule"
changes = { lr = 0.5, model = { dim = 32 } }
"""


def study(folder: Path, *replacements: tuple[str, str], **overrides: Any) -> StudyConfig:
    text = STUDY
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "mine.toml").write_text(text)
    return load_study(str(folder / "mine.toml"), overrides)


def refused(message: str, folder: Path, *replacements: tuple[str, str], **overrides: Any) -> None:
    with pytest.raises(UserError, match=message):
        study(folder, *replacements, **overrides)


def test_conditions_differ_from_the_common_settings_in_their_changes_alone(tmp_path: Path) -> None:
    config = study(tmp_path)
    assert (config.seeds, config.baseline, list(config.conditions)) == ((3, 1), "plain", ["plain", "delta"])
    delta = config.train_config("delta", 3)
    assert (delta.steps, delta.lr, delta.seed) == (5, 0.5, 3)
    assert (delta.model.dim, delta.model.heads) == (32, 2)
    plain = config.train_config("plain", 1)
    assert (plain.steps, plain.lr, plain.seed, plain.model.dim) == (5, TrainConfig(model=plain.model).rate, 1, 16)
    assert plain.model.residual.rule == "additive"
    common = to_plain(TrainConfig(steps=5, seed=1))
    assert {line.split(":")[0] for line in differences(common, to_plain(plain))} == {
        *("model.dim", "model.heads", "model.residual.rule", "model.residual.value_channels"),
        *("model.residual.expansion", "model.residual.plain_start", "lr"),
    }


def test_overrides_replace_keys(tmp_path: Path) -> None:
    config = study(tmp_path, seeds=[0, 1, 2], train={"steps": 9, "data": {"source": "x"}})
    assert config.seeds == (0, 1, 2)
    settings = config.train_config("plain", 2)
    assert (settings.steps, settings.data.source, settings.model.dim) == (9, "x", 16)


def learned_numbers(config: StudyConfig, condition: str) -> int:
    model = replace(config.train_config(condition, config.seeds[0]).model, vocab_size=257)
    return sum(parameter.numel() for parameter in GPT(model).parameters())


def test_matched_parameters_come_as_near_as_the_width_of_the_mlp_lets_them() -> None:
    free, matched = (load_study("parameterization", {"match_parameters": match}) for match in (False, True))
    wanted = learned_numbers(free, free.baseline)
    assert matched.train_config(free.baseline, 0) == free.train_config(free.baseline, 0)
    for condition in ("delta-rank-2", "delta-pooled", "delta-8", "delta-token", "delta-scalar", "expanded-additive"):
        one, other = (study.train_config(condition, 0) for study in (free, matched))
        assert replace(other, model=replace(other.model, mlp_dim=None)) == one
        # Three matrices per layer have one row or column of width D more for every further hidden feature.
        step = 3 * one.model.dim * one.model.layers
        assert abs(learned_numbers(matched, condition) - wanted) <= step / 2, condition


def test_parameters_that_cannot_be_matched_are_refused(tmp_path: Path) -> None:
    refused("match_parameters needs vocab_size where it or dim differs, as for delta", tmp_path, match_parameters=True)
    refused("need its mlp_dim: remove match_parameters", tmp_path, start={"steps": 2}, match_parameters=True)
    one = ("{ dim = 32 }", "{ vocab_size = 300 }")
    refused(
        "match_parameters needs vocab_size where it or dim differs, as for delta", tmp_path, one, match_parameters=True
    )
    sized = {"train": {"model": {"vocab_size": 9}}, "match_parameters": True}
    config = study(tmp_path, ("{ dim = 32 }", "{ dim = 20 }"), **sized)
    assert config.train_config("delta", 1).model.vocab_size == 9
    refused(
        "match_parameters decides mlp_dim: .* None for the baseline and 32 for delta",
        tmp_path,
        ("{ dim = 32 }", "{ mlp_dim = 32 }"),
        **sized,
    )
    refused(
        "delta has more parameters than the baseline even with", tmp_path, ("{ dim = 32 }", "{ dim = 512 }"), **sized
    )


def test_the_quick_study() -> None:
    """Few steps, enough seeds for intervals, what it asks written beforehand, every rate its own."""
    config = load_study("quick")
    assert config.baseline == "additive" and len(config.seeds) == 5 and config.primary is not None
    found = {}
    for name in config.conditions:
        settings = config.train_config(name, config.seeds[0])
        residual, rival = settings.model.residual, settings.model.rival
        found[name] = (rival or residual.rule, residual.value_channels, settings.lr)
        assert (settings.data.source, settings.threads, settings.device) == ("stdlib", 1, "cpu")
        assert settings.steps <= 150
    assert found == {
        "additive": ("additive", 1, 1.25e-2),
        "ddl": ("additive_erase", 4, 1.25e-2),
        "ddl-write-only": ("additive_erase", 4, 1.25e-2),
        "additive-convolution": ("additive", 1, 1.25e-2),
        "mhc": ("mhc", 4, 5e-3),
    }


@pytest.mark.parametrize("name", named_studies())
def test_every_named_study_is_valid_and_its_conditions_share_the_data_order(name: str) -> None:
    config = load_study(name)
    assert config.name == name
    orders = set()
    for condition in config.conditions:
        settings = config.train_config(condition, config.seeds[0])
        assert parameter_count(replace(settings.model, vocab_size=257)) > 0  # it can be built
        orders.add((settings.batch_size * settings.accumulate, settings.model.context, settings.steps, settings.data))
    assert len(orders) == 1


def test_the_control_of_the_quick_study_cannot_erase() -> None:
    config = load_study("quick")
    plain = {name: to_plain(config.train_config(name, 0)) for name in config.conditions}
    assert differences(plain["ddl"], plain["ddl-write-only"]) == [
        "model.residual.erase_init: 0.1 there, 0.0 here",
        "model.residual.gate: 'linear' there, 'constant' here",
    ]


def test_unknown_studies() -> None:
    with pytest.raises(
        UserError, match=r"there is no study 'quik'; did you mean 'quick'\?.*A file of your own ends in"
    ):
        load_study("quik")
    with pytest.raises(UserError, match=r"there is no study file absent\.toml; named studies are: .*quick"):
        load_study("absent.toml")
    with pytest.raises(UserError, match=r"there is no study '\.\./named/quick'"):
        load_study("../named/quick")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "seeds = [3, 1]",
            "seeds = [3, 1]\nformat = 2",
            "mine.toml has format 2, and this version reads 1",
        ),
        ("seeds = [3, 1]", "seeds = [3, 1]\nbudgets = ['time']\nsearch = {}", "compares on no seeds .* remove budgets"),
        ("seeds = [3, 1]", "sedes = [3, 1]", "mine.toml: unknown key 'sedes'; did you mean 'seeds'"),
        ("seeds = [3, 1]", "seeds = [1, 1]", r"seeds must be different numbers from 0 on.*got \[1, 1\]"),
        ("seeds = [3, 1]", "seeds = []", "seeds must be different numbers from 0 on, at least one"),
        ("seeds = [3, 1]", "seeds = [-1]", r"seeds must be different numbers from 0 on.*got \[-1\]"),
        ("seeds = [3, 1]", "seeds = ['3']", "seeds.0: .*valid integer, got '3'"),
        ("seeds = [3, 1]", "", "mine.toml: seeds: Field required"),
        ('baseline = "plain"', 'baseline = "plian"', "baseline must be one of .* got 'plian'; did you mean 'plain'"),
        ("steps = 5", "step = 5", "condition plain: unknown key 'step'; did you mean 'steps'"),
        ("steps = 5", "steps = 0", "condition plain: steps must be at least 1, got 0"),
        ("steps = 5", "steps = 'x'", "condition plain: steps: .*valid integer, got 'x'"),
        ("steps = 5", "seed = 5", "the seed of a run comes from the study's seeds"),
        ("lr = 0.5,", "seed = 5,", "the seed of a run comes from the study's seeds"),
        ("lr = 0.5,", "lrr = 0.5,", "condition delta: unknown key 'lrr'; did you mean 'lr'"),
        ("lr = 0.5,", "data = { source = 'x' },", "conditions must share 'data', .* changes of delta to train"),
        ("lr = 0.5,", "threads = 4,", "conditions must share 'threads'"),
        (
            "lr = 0.5,",
            "batch_size = 3,",
            "all conditions must make steps of as many tokens, got .* for plain and .* for delta",
        ),
        ("changes = { lr", "change = { lr", "conditions.delta: unknown key 'change'; did you mean 'changes'"),
        ('summary = "the delta rule"', "", "conditions.delta.summary: Field required"),
        ("[conditions.delta]", '[conditions."a/b"]', "names of studies and conditions name files: .*got 'a/b'"),
        ("[conditions.delta]", '[conditions."../b"]', "names of studies and conditions name files: .*got '../b'"),
        ('name = "mine"', 'name = "/tmp/x"', "names of studies and conditions name files: .*got '/tmp/x'"),
        ("steps = 5", "steps = ", "mine.toml must hold a TOML table, but is damaged"),
        (
            "[train]\nsteps = 5\nmodel = { dim = 16, heads = 2 }",
            "train = 5",
            "mine.toml: train: Input should be an object, got 5",
        ),
    ],
)
def test_study_files_that_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    refused(message, tmp_path, (old, new))


@pytest.mark.parametrize("name", ["cost_rounds", "rewrite_tokens"])
def test_ranges(tmp_path: Path, name: str) -> None:
    refused(f"{name} must be at least 1, got 0", tmp_path, ("seeds = [3, 1]", f"seeds = [3, 1]\n{name} = 0"))


def test_a_study_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(UserError, match=r"mine\.toml must hold a TOML table, but is damaged"):
        load_study(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quik",), "there is no study 'quik'; did you mean 'quick'?"),
        (("quick", "--steps", "0"), "steps must be at least 1, got 0"),
        (("quick", "--seeds", "1", "1"), "seeds must be different numbers from 0 on"),
        (("quick", "--workers", "0"), "workers must be at least 1, got 0"),
        (("quick", "--source", "no/such/file"), "there is nothing at 'no/such/file'"),
        (
            ("quick", "--source", "short.txt"),
            "context must be smaller than the number of tokens in each split; it is 128",
        ),
        (("quick", "--sedes", "1"), "--seeds"),
        (("sizes", "--steps", "7"), "the steps of sizes are set by small, medium, large, so --steps cannot"),
        (("parameterization", "--steps", "7"), "set by the rungs of the search, so --steps cannot"),
        (("parameterization", "--seeds", "7"), "parameterization searches on the seeds of its rungs"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_of_the_command(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short for the context of that study " * 10)
    with pytest.raises(SystemExit) as ended:
        main(["study", *arguments, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_the_primary_contrast_is_one_that_the_study_makes(tmp_path: Path) -> None:
    table = '\n[primary]\ncondition = "delta"\nrefuted = "above 0"\nstop = "two seeds"\n\n[train]\nsteps'
    assert study(tmp_path, ("\n[train]\nsteps", table)).primary.stop == "two seeds"
    refused(
        "condition must be one besides the baseline, got 'plain'",
        tmp_path,
        ("\n[train]\nsteps", table.replace('"delta"', '"plain"')),
    )
    other = table.replace("refuted", 'reference = "delta"\nrefuted')
    refused("delta is compared with the baseline and its control, got 'delta'", tmp_path, ("\n[train]\nsteps", other))


@pytest.mark.parametrize("budget", ["flops", "time"])
def test_steps_of_different_work_are_compared_at_equal_tokens_alone(tmp_path: Path, budget: str) -> None:
    looped = ("model = { dim = 16, heads = 2 }", "draw_repeats = true\nmodel = { dim = 16, heads = 2, repeats = 3 }")
    short = ("changes = { lr = 0.5, model = { dim = 32 } }", "changes = { lr = 0.5 }")
    assert study(tmp_path, looped, short).train_config("delta", 1).draw_repeats
    refused(
        "plain draws how often .* leave draw_repeats out, or compare at",
        tmp_path,
        looped,
        short,
        budgets=["tokens", budget],
    )

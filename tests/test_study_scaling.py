"""Laws of loss against compute and successive halving: known truths, other solvers, refusals, and whole studies."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from deepdelta import UserError
from deepdelta.config import from_plain
from deepdelta.lab import runner
from deepdelta.lab.analysis.comparison import Estimate
from deepdelta.lab.analysis.results import StudyResults, load_results
from deepdelta.lab.analysis.scaling import EffectiveSpeed, Law, Scaling, fit, scaling
from deepdelta.lab.experiments.config import Extrapolate, StudyConfig, load_study
from deepdelta.lab.experiments.search import SearchResults
from deepdelta.lab.views.study import scaling_table, search_table, trend_table
from deepdelta.training import RunDirectory
from report_samples import anew
from report_samples import study as sample
from tiny_runs import RUNS, text_file, trained_here

pytestmark = pytest.mark.usefixtures("unchecked_file")
COMPUTE = [1e12, 4e12, 1.5e13, 8e13]


def test_a_line_in_logarithms_equals_scipys_regression() -> None:
    losses = [2.1, 1.83, 1.7, 1.42]
    law = fit(COMPUTE, losses, floor=False)
    line = stats.linregress(np.log(COMPUTE), np.log(losses))
    assert law.exponent == pytest.approx(-line.slope, rel=1e-9) and law.floor == 0
    assert law.loss(1e15) == pytest.approx(math.exp(line.intercept + line.slope * math.log(1e15)), rel=1e-9)


@pytest.mark.parametrize(("b", "exponent", "floor"), [(40.0, 0.12, 1.0), (300.0, 0.2, 0.3), (8.0, 0.05, 0.0)])
def test_fits_recover_the_law_that_made_the_losses(b: float, exponent: float, floor: float) -> None:
    def truth(flops: float) -> float:
        return floor + b * flops**-exponent

    law = fit(COMPUTE, [truth(c) for c in COMPUTE], floor=True)
    assert law.exponent == pytest.approx(exponent, rel=0.02) and law.floor == pytest.approx(floor, abs=0.03)
    assert law.loss(1e15) == pytest.approx(truth(1e15), rel=1e-3)
    if floor == 0:
        assert fit(COMPUTE, [truth(c) for c in COMPUTE], floor=False).exponent == pytest.approx(exponent, rel=1e-9)


@pytest.mark.parametrize(
    ("flops", "losses", "floor", "message"),
    [
        ([1.0, 1.0], [2.0, 2.0], False, "at least 2 sizes with different compute"),
        ([1.0, 2.0], [2.0, 1.0], True, "at least 3 sizes"),
        ([1.0, 0.0], [2.0, 1.0], False, "compute and losses above 0"),
        ([1.0, 2.0], [2.0, math.nan], False, "compute and losses above 0"),
    ],
)
def test_what_cannot_be_fitted(flops: list[float], losses: list[float], floor: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(flops, losses, floor=floor)


def at_sizes(exponent: float, noise: float) -> dict[str, StudyResults]:
    """Three sizes: the baseline's losses follow C^-0.1, the other's C^-exponent, each seed has its own offset."""
    draw = np.random.default_rng(0)
    offsets = np.exp(draw.normal(0, 0.05, 6))
    found = {}
    for number in range(3):
        base = sample({"additive": [0.0] * 6, "delta": [0.0] * 6})
        conditions = []
        for one, power in zip(base.conditions, (0.1, exponent), strict=True):
            size = dataclasses.replace(one, flops_per_token=1e6 * 5**number)
            compute = 40 * 2048 * size.flops_per_token
            runs = tuple(
                dataclasses.replace(
                    run, validation_loss=20 * offset * compute**-power * math.exp(draw.normal(0, noise))
                )
                for run, offset in zip(size.runs, offsets, strict=True)
            )
            conditions.append(dataclasses.replace(size, runs=runs))
        found[f"s{number}"] = anew(base, conditions=tuple(conditions))
    return found


def test_the_gap_is_carried_to_the_stated_compute_with_its_interval() -> None:
    studies = at_sizes(0.11, 1e-4)
    found = scaling(studies, "grow", Extrapolate(flops=1e15), command="")
    base, other = found.fits
    assert base.gap is None and base.gap_of_largest is None and other.gap is not None and other.gap.interval is not None
    assert base.law.exponent == pytest.approx(0.1, abs=1e-3) and other.law.exponent == pytest.approx(0.11, abs=1e-3)
    mean = np.exp(np.random.default_rng(0).normal(0, 0.05, 6)).mean() * 20
    truth = mean * (1e15**-0.11 - 1e15**-0.1)
    assert other.gap.mean == pytest.approx(truth, rel=0.01)
    assert other.gap.interval.low <= truth <= other.gap.interval.high < 0
    # The offsets of seeds, 5 %, are shared by both conditions: they widen the loss's interval, not so the gap's.
    assert width(other.at) > 2 * width(other.gap)
    assert base.flops == pytest.approx([40 * 2048 * 1e6 * 5**number for number in range(3)])
    rows = scaling_table(found).rows
    assert rows[0][-2:] == ("-", "-") and rows[1][-2].startswith(
        f"{other.gap.mean:+.4f}\n({other.gap.interval.low:+.4f}"
    )
    assert len(rows[1][1].split("\n")) == 3
    pair = scaling({name: studies[name] for name in ("s1", "s2")}, "grow", Extrapolate(flops=1e15), command="").fits[1]
    assert other.gap_of_largest == pair.gap and pair.gap_of_largest is None
    shuffled = scaling(
        {name: studies[name] for name in ("s2", "s0", "s1")}, "grow", Extrapolate(flops=1e15), command=""
    )
    assert shuffled.fits[1].gap_of_largest == other.gap_of_largest


def width(estimate: Estimate) -> float:
    assert estimate.interval is not None
    return estimate.interval.high - estimate.interval.low


def test_estimates_are_means_over_laws_of_single_seeds_with_students_interval() -> None:
    studies = at_sizes(0.11, 0.02)
    base, other = scaling(studies, "grow", Extrapolate(flops=1e15), command="").fits
    gaps, exponents = [], []
    for seed in other.seeds:
        lines = {}
        for one in (base, other):
            losses = [results.condition(one.condition).losses()[seed] for results in studies.values()]
            line = lines[one.condition] = stats.linregress(np.log(one.flops), np.log(losses))
        exponents.append(-line.slope)
        foretold = {name: math.exp(line.intercept + line.slope * math.log(1e15)) for name, line in lines.items()}
        gaps.append(foretold["delta"] - foretold["additive"])
    assert other.gap is not None
    for estimate, values in ((other.gap, gaps), (other.exponent, exponents)):
        reach = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert estimate.mean == pytest.approx(np.mean(values), rel=1e-9) and estimate.interval is not None
        assert (estimate.interval.low, estimate.interval.high) == pytest.approx(reach, rel=1e-9)


def test_the_slope_of_a_difference_is_that_of_scipys_line_for_every_seed() -> None:
    studies = at_sizes(0.13, 0.01)
    found = scaling(studies, "grow", Extrapolate(flops=1e15), command="")
    (trend,) = found.trends
    assert (trend.condition, trend.reference, trend.seeds) == ("delta", "additive", tuple(range(6)))
    by_size = [next(one for one in own.contrasts if one.condition == "delta").differences for own in studies.values()]
    slopes = [stats.linregress(np.log(found.fits[0].flops), [at[seed] for at in by_size]).slope for seed in range(6)]
    reach = stats.t.interval(0.95, 5, np.mean(slopes), stats.sem(slopes))
    assert trend.slope.mean == pytest.approx(np.mean(slopes), rel=1e-9) and trend.slope.interval is not None
    assert (trend.slope.interval.low, trend.slope.interval.high) == pytest.approx(reach, rel=1e-9)
    assert trend.differences == pytest.approx([np.mean(list(at.values())) for at in by_size])
    (row,) = trend_table(found).rows
    assert row[:3] == ("delta", "additive", f"{trend.differences[0]:+.4f}")
    assert row[-1].startswith(f"{trend.slope.mean:+.4f}\n({trend.slope.interval.low:+.4f}")


def test_effective_speed_is_the_baseline_s_compute_for_the_same_loss_times_the_speed() -> None:
    """Losses of the baseline on a line in ln C: what a difference is worth is read off it by hand."""
    draw, studies = np.random.default_rng(0), {}
    for steps, change in ((400, 0.05), (1600, 0.05), (6400, -0.05)):
        plain = 2.0 - 0.1 * math.log(steps) + draw.normal(0, 1e-3, 6)
        base = sample({"additive": list(plain), "delta": list(plain - change)})
        conditions = [
            dataclasses.replace(
                one,
                flops_per_token=1e6,
                cost=dataclasses.replace(one.cost, speed_ratio=0.8),
                runs=tuple(dataclasses.replace(run, steps=steps) for run in one.runs),
            )
            for one in base.conditions
        ]
        studies[f"s{steps}"] = anew(base, conditions=tuple(conditions))

    def speeds() -> tuple[EffectiveSpeed, ...]:
        (trend,) = scaling(studies, "ladder", Extrapolate(flops=1e15), command="").trends
        assert all(trend.effective_speed)
        return trend.effective_speed  # type: ignore[return-value]

    worth = [0.8 * math.exp(sign * 0.05 / 0.1) for sign in (1, 1, -1)]
    assert [one.ratio for one in speeds()] == pytest.approx(worth, rel=0.02) and {one.bound for one in speeds()} == {
        None
    }
    plain, other = studies["s6400"].conditions
    better = tuple(dataclasses.replace(run, validation_loss=0.1) for run in other.runs)
    ended = studies["s6400"]
    studies["s6400"] = anew(ended, conditions=(plain, dataclasses.replace(other, runs=better)))
    assert speeds()[2] == EffectiveSpeed(ratio=pytest.approx(0.8), bound="above")
    found = scaling(studies, "ladder", Extrapolate(flops=1e15), command="")
    assert trend_table(found).rows[0][-2].split("\n")[1:] == ["1.31x", "> 0.80x"]
    worse = tuple(dataclasses.replace(run, validation_loss=9.0) for run in other.runs)
    studies["s6400"] = anew(ended, conditions=(plain, dataclasses.replace(other, runs=worse)))
    assert speeds()[2] == EffectiveSpeed(ratio=pytest.approx(0.8 / 16), bound="below")
    # Without its cost at one size, at other budgets, where more than the steps differs.
    studies["s6400"] = anew(ended, conditions=(plain, dataclasses.replace(other, cost=None)))
    found = scaling(studies, "ladder", Extrapolate(flops=1e15), command="")
    assert trend_table(found).rows[0][-2].split("\n")[2] == "-"
    studies["s6400"] = ended
    for budget in ("flops", "time"):
        others = {name: anew(one, budgets=(budget,)) for name, one in studies.items()}
        assert set(scaling(others, "ladder", Extrapolate(flops=1e15), command="").trends[0].effective_speed) == {None}
    wider = anew(ended, budget=dataclasses.replace(ended.budget, tokens_per_step=1))
    mixed = scaling(studies | {"s6400": wider}, "ladder", Extrapolate(flops=1e15), command="")
    (grown,) = scaling(at_sizes(0.13, 0.01), "grow", Extrapolate(flops=1e15), command="").trends
    for trend in (mixed.trends[0], grown):
        assert set(trend.effective_speed) == {None}


def test_no_gap_is_found_where_there_is_none() -> None:
    gap = scaling(at_sizes(0.1, 0.01), "grow", Extrapolate(flops=1e15), command="").fits[1].gap
    assert gap is not None and gap.interval is not None and gap.interval.low < 0 < gap.interval.high


def test_conditions_without_a_common_seed_have_no_fit() -> None:
    studies = at_sizes(0.1, 0.01)
    last = studies["s2"]
    gone = dataclasses.replace(last.conditions[1], runs=())
    studies["s2"] = anew(last, conditions=(last.conditions[0], gone))
    with pytest.raises(UserError, match="delta and additive finished no seed at every size"):
        scaling(studies, "grow", Extrapolate(flops=1e15), command="")


STUDY = """
name = "tiny"
question = "Which?"
baseline = "plain"
seeds = [0]
cost_rounds = 1
rewrite_tokens = 32
KIND
[train]
steps = 8
warmup = 2
eval_every = 100
final_eval_tokens = 128
RUNS
[conditions.plain]
summary = "x + h"
changes.model.residual = { rule = "additive", value_channels = 1, expansion = "repeat" }
[conditions.delta]
summary = "a rewrite"
changes.model.residual = { value_channels = 1, expansion = "repeat" }
[conditions.slow]
summary = "one that hardly learns"
changes.lr = 1e-6
[conditions.diverging]
summary = "one that does not"
changes = { lr = 1e30, warmup = 0 }
""".replace("RUNS\n", RUNS)
SEARCH = """
[search]
candidates = ["diverging", "slow", "delta"]
[[search.rungs]]
steps = 6
seeds = [5, 6]
keep = 2
[[search.rungs]]
steps = 12
seeds = [5]
keep = 1
"""
SIZES = """
extrapolate = { flops = 1e12 }
[sizes.small]
model = { dim = 8 }
[sizes.large]
steps = 12
"""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(runner, "measure", lambda *_: {})
    return trained_here(monkeypatch)


def study(folder: Path, kind: str, *drop: str) -> StudyConfig:
    text = STUDY.replace("SOURCE", str(text_file(folder / "text.txt"))).replace("KIND", kind)
    for name in drop:
        text = text[: text.index(f"[conditions.{name}]")]
    (folder / "study.toml").write_text(text)
    return load_study(str(folder / "study.toml"))


def test_a_search_halves_its_candidates(tmp_path: Path, launched: list[str]) -> None:
    config, out = study(tmp_path, SEARCH), tmp_path / "out"
    runner.run(config, out, command="deepdelta study")
    found = from_plain(SearchResults, json.loads((out / "search.json").read_text()))
    first, second = found.rungs
    assert [(one.condition, one.kept) for one in first.ranking] == [
        ("delta", True),
        ("slow", True),
        ("diverging", False),
    ]
    assert [(one.condition, one.kept) for one in second.ranking] == [("delta", True), ("slow", False)]
    assert found.winners == ("delta",) and first.ranking[2].mean is None and first.ranking[2].change is None
    assert launched == [
        *(f"{name}+search-6-seed{seed}" for seed in (5, 6) for name in ("plain", "diverging", "slow", "delta")),
        *(f"{name}+search-12-seed5" for name in ("plain", "delta", "slow")),
    ]
    for name, losses in (("delta", first.ranking[0].losses), ("plain", first.baseline)):
        for seed, loss in losses.items():
            run = RunDirectory(out / "runs" / f"{name}+search-6-seed{seed}")
            assert list(run.metrics())[-1]["validation_loss"] == loss
            assert run.config().data.held_out == "train_tail" and run.config().steps == 6
    change = first.ranking[0].change
    assert change is not None and change.n == 2
    differences = [(first.ranking[0].losses[seed] or 0) - (first.baseline[seed] or 0) for seed in (5, 6)]
    assert change.mean == pytest.approx(np.mean(differences))
    assert [row[0] for row in search_table(found).rows] == [
        "delta (kept)", "slow (kept)", "diverging", "delta (kept)", "slow",
    ]  # fmt: skip
    launched.clear()
    runner.run(config, out, command="deepdelta study")
    assert not launched


def test_a_study_over_sizes_fits_laws(tmp_path: Path, launched: list[str]) -> None:
    config, out = study(tmp_path, SIZES, "slow"), tmp_path / "out"
    runner.run(config, out, command="deepdelta study")
    found = from_plain(Scaling, json.loads((out / "scaling.json").read_text()))
    assert found.sizes == ("small", "large") and [one.condition for one in found.fits] == ["plain", "delta"]
    by_size = {size: load_results(out / size / "results.json") for size in found.sizes}
    assert [by_size[size].budget.steps for size in found.sizes] == [8, 12]
    for one in found.fits:
        assert one.losses == tuple(by_size[size].condition(one.condition).losses()[0] for size in found.sizes)
        assert one.flops[1] == 12 * 32 * by_size["large"].condition(one.condition).flops_per_token
        law = Law(**dataclasses.asdict(one.law))
        assert [law.loss(c) for c in one.flops] == pytest.approx(list(one.losses))  # two points, one line
    assert len(launched) == 4
    launched.clear()
    runner.run(config, out, command="deepdelta study")
    assert not launched


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        (SEARCH, "seeds = [5, 6]", "seeds = [0]", r"the search must not see the seeds that confirm, both have \[0\]"),
        (SEARCH, "keep = 2", "keep = 3", r"every rung must keep fewer candidates than it gets, got \[3, 1\] of 3"),
        (SEARCH, "keep = 1", "keep = 0", "keep must be at least 1, got 0"),
        (SEARCH, '"slow"', '"slwo"', "candidates must be conditions other than the baseline, got 'slwo'; did you mean"),
        (SEARCH, '"slow"', '"plain"', "candidates must be conditions other than the baseline, got 'plain'"),
        (SIZES, "extrapolate = { flops = 1e12 }", "", "sizes and extrapolate go together"),
        (SIZES, "1e12", "1e12, floor = true", "extrapolate needs at least 3 sizes"),
        (SIZES, "1e12", "0.0", "extrapolate needs at least 2 sizes and flops above 0, got 2 and 0"),
        (SIZES, "[sizes.small]", '[sizes."a/b"]', "names of sizes name folders"),
        (SIZES, "dim = 8", "dmi = 8", "unknown key 'dmi'; did you mean 'dim'"),
        (SIZES + SEARCH, "", "", "either searches or fits laws over sizes"),
    ],
)
def test_plans_that_are_refused(tmp_path: Path, kind: str, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(tmp_path, kind.replace(old, new) if old else kind)

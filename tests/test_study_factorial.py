"""Effects of factors against hand-worked means, another least-squares solution and a known truth; and the tables."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from deepdelta import UserError
from deepdelta.lab.analysis.comparison import MINIMUM_SEEDS
from deepdelta.lab.analysis.factorial import design
from deepdelta.lab.analysis.results import ConditionResult, Factorial, Power, RunResult, StudyResults, Tuned
from deepdelta.lab.analysis.statistics import holm, paired
from deepdelta.lab.experiments.config import load_study
from deepdelta.lab.views import detail_tables
from deepdelta.lab.views.page import render_page
from deepdelta.lab.views.tables import markdown_table
from report_samples import Page, anew, study

LEVELS = {"write": ["branch", "target"], "erase": ["no", "yes"], "expansion": ["repeat", "conv", "none"]}
ALL = Factorial(factors=tuple(LEVELS))
SEEDS = range(6)


def conditions() -> dict[str, dict[str, str]]:
    return {"-".join(own): dict(zip(LEVELS, own, strict=True)) for own in itertools.product(*LEVELS.values())}


def results(losses: dict[str, list[float]], factorial: Factorial = ALL) -> StudyResults:
    """A study with one condition per combination of levels; the first is the baseline."""
    made = tuple(
        ConditionResult(
            name=name,
            summary="",
            rule="delta",
            value_channels=1,
            parameters=1,
            flops_per_token=1.0,
            factors=conditions()[name],
            runs=tuple(RunResult(seed=seed, validation_loss=loss, seconds=1.0) for seed, loss in enumerate(values)),
        )
        for name, values in losses.items()
    )
    return anew(
        study(),
        baseline=made[0].name,
        conditions=made,
        seeds=tuple(SEEDS),
        factorials={"parts": factorial},
    )


def test_weights_of_a_full_factorial_are_differences_of_means() -> None:
    """Worked by hand for 2 x 2: main effects weigh by a half, the interaction is the difference of differences."""
    levels = {a + b: {"a": a, "b": b} for a, b in itertools.product("01", "xy")}
    found = design("f", Factorial(factors=("a", "b")), levels)
    half, one = 0.5, 1.0
    for name, weights in {
        "a: 1 - 0": {"0x": -half, "0y": -half, "1x": half, "1y": half},
        "b: y - x": {"0x": -half, "0y": half, "1x": -half, "1y": half},
        "a: 1 - 0 x b: y - x": {"0x": one, "0y": -one, "1x": -one, "1y": one},
    }.items():
        assert found.pop(name) == pytest.approx(weights, abs=1e-12)
    assert not found


def test_effects_recover_a_known_truth() -> None:
    """Losses built from main effects and one interaction, and noise that differs by seed and condition."""
    draw = np.random.default_rng(3)
    losses = {
        name: [
            2.0
            + 0.3 * seed
            - 0.10 * (own["write"] == "target")
            + 0.04 * (own["expansion"] == "conv")
            - 0.08 * (own["write"] == "target") * (own["erase"] == "yes")
            + draw.normal(0, 1e-4)
            for seed in SEEDS
        ]
        for name, own in conditions().items()
    }
    found = {one.name: one.comparison for one in results(losses).effects}
    truth = {
        "write: target - branch": -0.10 - 0.04,  # the interaction counts for half of the conditions
        "erase: yes - no": -0.04,
        "expansion: conv - repeat": 0.04,
        "expansion: none - repeat": 0.0,
        "write: target - branch x erase: yes - no": -0.08,
        "write: target - branch x expansion: conv - repeat": 0.0,
        "erase: yes - no x expansion: none - repeat": 0.0,
    }
    assert len(found) == 4 + 1 + 2 + 2
    for name, value in truth.items():
        assert found[name].mean == pytest.approx(value, abs=3e-4)
        interval = found[name].t_interval
        assert interval is not None and (interval.low <= 0 <= interval.high) == (value == 0.0)


def test_effects_equal_an_independent_least_squares_fit_with_dummy_codes() -> None:
    """The same model with treatment codes and numpy's solver, also on a fraction; then scipy's t and Holm."""
    draw = np.random.default_rng(4)
    names = [name for number, name in enumerate(conditions()) if number not in (3, 8)]
    losses = {name: draw.normal(2, 0.1, len(SEEDS)).tolist() for name in names}
    rows = []
    for name in names:
        w, e, c, n = (
            float(conditions()[name][factor] == level)
            for factor, level in (("write", "target"), ("erase", "yes"), ("expansion", "conv"), ("expansion", "none"))
        )
        rows.append([1, w, e, c, n, w * e, w * c, w * n, e * c, e * n])
    solution = np.linalg.lstsq(np.array(rows), np.array([losses[name] for name in names]), rcond=None)[0]
    found = {one.name: one.comparison for one in results(losses).effects}
    expected = {
        "write: target - branch x erase: yes - no": solution[5],
        "write: target - branch x expansion: none - repeat": solution[7],
        "erase: yes - no x expansion: conv - repeat": solution[8],
        # The effect of a treatment code is at the other factors' first levels; averaged over all of theirs:
        "write: target - branch": solution[1] + solution[5] / 2 + (solution[6] + solution[7]) / 3,
        "expansion: none - repeat": solution[4] + solution[7] / 2 + solution[9] / 2,
    }
    for name, values in expected.items():
        assert found[name].mean == pytest.approx(values.mean(), rel=1e-9)
        assert found[name].p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)
    raw = [one.p_value for one in found.values() if one.p_value is not None]
    assert len(raw) == 9 and [one.adjusted_p for one in found.values()] == pytest.approx(list(holm(raw)))


def test_seeds_that_some_condition_lacks_are_left_out() -> None:
    losses: dict[str, list[float]] = {name: [1.0 + 0.1 * seed for seed in SEEDS] for name in conditions()}
    study_results = results(losses)
    broken = study_results.conditions[2]
    runs = (*broken.runs[:1], dataclasses.replace(broken.runs[1], validation_loss=None), *broken.runs[2:])
    changed = [dataclasses.replace(c, runs=runs) if c is broken else c for c in study_results.conditions]
    found = anew(study_results, conditions=tuple(changed)).effects
    assert {one.comparison.n for one in found} == {len(SEEDS) - 1}
    missing = [dataclasses.replace(c, runs=()) if c is broken else c for c in study_results.conditions]
    assert anew(study_results, conditions=tuple(missing)).effects == ()


@pytest.mark.parametrize(
    ("factorial", "kept", "message"),
    [
        (ALL, 7, r"factorials.f: the 7 conditions do not tell these effects from others: .*Add conditions"),
        (Factorial(factors=("write", "erse")), 12, "no condition has a factor 'erse'; did you mean 'erase'"),
        (Factorial(factors=("write",), where={"erse": "no"}), 12, "no condition has a factor 'erse'"),
        (Factorial(factors=("write", "erase"), where={"write": "target"}), 12, "'write' must have at least two levels"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(factorial: Factorial, kept: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        design("f", factorial, dict(list(conditions().items())[:kept]))


def test_a_half_fraction_tells_main_effects_alone() -> None:
    """2^(3-1) with c = a b: every interaction of two is a main effect's alias."""
    levels = {f"{a}{b}": {"a": str(a), "b": str(b), "c": str(a ^ b)} for a, b in itertools.product((0, 1), repeat=2)}
    with pytest.raises(UserError, match=r"effects from others: a: 1 - 0; b: 1 - 0; c: 1 - 0; a: 1 - 0 x b: 1 - 0"):
        design("f", Factorial(factors=("a", "b", "c")), levels)
    found = design("f", Factorial(factors=("a", "b", "c"), interactions=False), levels)
    assert found["c: 1 - 0"] == pytest.approx({"00": -0.5, "01": 0.5, "10": 0.5, "11": -0.5})


def test_the_control_matrix_tells_all_its_effects_apart() -> None:
    config = load_study("control-matrix")
    levels = {name: condition.factors for name, condition in config.conditions.items()}
    assert {title: len(design(title, one, levels)) for title, one in config.factorials.items()} == {
        "rules": 4 + 6,
        "channels": 3 + 3,
        "rewrite": 4 + 6,
    }
    rules = {(c.rule, c.value_channels) for c in (config.train_config(n, 0).model.residual for n in config.conditions)}
    assert rules == {
        (rule, v) for rule in ("additive", "additive_erase", "write_only", "delta", "erase_only") for v in (1, 4)
    }
    assert len(config.conditions) == 25 + 2 * 6 and len(config.seeds) >= MINIMUM_SEEDS
    for name, condition in config.conditions.items():
        if condition.control is not None:  # which differs in the rule alone
            own, other = (config.train_config(n, 0).model.residual for n in (name, condition.control))
            # The start of a gate means nothing to a rule without one.
            inert = {"gate_init": other.gate_init} if other.rule == "additive" else {}
            assert dataclasses.replace(own, rule=other.rule, **inert) == other


def with_designs() -> StudyResults:
    """Three conditions: a control, two budgets, tuned rates, a power calculation that the seeds do not meet."""
    draw = np.random.default_rng(5)
    first = study({name: draw.normal(1.7, 0.02, 5).tolist() for name in ("additive", "delta", "write")})
    changed = []
    for number, one in enumerate(first.conditions):
        runs = tuple(dataclasses.replace(run, steps=40 - number) for run in one.runs)
        faster = tuple(
            dataclasses.replace(run, validation_loss=run.validation_loss + 0.1 * number, steps=30, curve=())
            for run in one.runs
            if run.validation_loss is not None
        )
        changed.append(
            dataclasses.replace(
                one,
                runs=runs,
                matched={"flops": faster},
                control="write" if one.name == "delta" else None,
                factors={"write": "yes" if number else "no"},
                tuned=Tuned(lr=1e-3, edge=number == 1, grid=(1e-3, 2e-3), losses=(1.8, None), seeds=(9,)),
            )
        )
    return anew(
        first,
        conditions=tuple(changed),
        budgets=("tokens", "flops"),
        factorials={"writing": Factorial(factors=("write",))},
        power=Power(pilot_sd=0.02, difference=0.01),
        exploratory=True,
    )


def test_contrasts_pair_each_condition_with_baseline_and_control_at_each_budget() -> None:
    given = with_designs()
    found = {(one.budget, one.condition, one.reference): one.comparison for one in given.contrasts}
    pairs = [("delta", "additive"), ("delta", "write"), ("write", "additive")]
    assert list(found) == [(budget, *pair) for budget in ("tokens", "flops") for pair in pairs]
    for budget in given.budgets:
        family = []
        for one, other in pairs:
            losses, reference = given.condition(one).losses(budget), given.condition(other).losses(budget)
            expected = paired([losses[seed] - reference[seed] for seed in given.seeds])
            assert dataclasses.replace(found[budget, one, other], adjusted_p=None) == expected
            assert expected.p_value is not None
            family.append(expected.p_value)
        assert [found[budget, *pair].adjusted_p for pair in pairs] == pytest.approx(list(holm(family)))


def test_detail_tables_hold_their_numbers_in_text_and_page() -> None:
    given = with_designs()
    comparisons, factors, tuning = detail_tables(given)
    assert [len(table.rows) for table in (comparisons, factors, tuning)] == [6, 2, 3]
    page = Page(render_page(given))
    for number, table in enumerate((comparisons, factors, tuning), 1):
        assert all(len(row) == len(table.columns) for row in table.rows)
        shown = page.rows[f"detail-{number}"][1:]
        assert [[" ".join(cell.split()) for cell in row] for row in shown] == [
            [" ".join(cell.split()) for cell in row] for row in table.rows
        ]
        assert markdown_table(table).startswith(f"### {table.title}\n")
        assert "Exploratory: a difference of 0.01 nats with a pilot's paired spread of 0.02 takes " in table.notes[-1]
    first = comparisons.rows[1]
    mean = given.contrasts[1].comparison.mean
    assert first[:5] == ("delta", "write", "tokens", "39\n(38)", f"{mean:+.4f}")
    assert tuning.rows[1] == ("delta", "0.001 (edge)", "1.8000", "diverged")
    effect = given.effects[0].comparison.mean
    losses = [given.condition(name).losses() for name in ("additive", "delta", "write")]
    assert effect == pytest.approx(math.fsum((losses[1][s] + losses[2][s]) / 2 - losses[0][s] for s in given.seeds) / 5)
    assert factors.rows[0][:2] == ("write: yes - no", "writing") and factors.rows[0][3] == f"{effect:+.4f}"


def test_a_plain_study_has_no_such_tables() -> None:
    assert detail_tables(study()) == () and "detail-1" not in render_page(study())

"""Paired statistics against scipy's own tests, simulation, textbook values and hand computation."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deepdelta.errors import UserError
from deepdelta.lab.analysis.comparison import MINIMUM_SEEDS, Comparison, Interval
from deepdelta.lab.analysis.statistics import (
    holm,
    paired,
    seeds_needed,
    smallest_resolvable,
)
from deepdelta.lab.views.tables import verdict

BASELINE = [1.714, 1.658, 1.702, 1.690, 1.671, 1.683]
CONDITION = [1.653, 1.647, 1.660, 1.688, 1.640, 1.651]


def differences() -> list[float]:
    return [a - b for a, b in zip(CONDITION, BASELINE, strict=True)]


def test_paired_equals_scipys_paired_t_test() -> None:
    expected = stats.ttest_rel(CONDITION, BASELINE)
    interval = expected.confidence_interval(0.95)
    comparison = paired(differences())
    assert comparison.n == 6
    assert comparison.mean == pytest.approx(np.mean(differences()), rel=1e-12)
    assert comparison.sd == pytest.approx(np.std(differences(), ddof=1), rel=1e-12)
    assert comparison.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert comparison.t_interval is not None
    assert comparison.t_interval.low == pytest.approx(interval.low, rel=1e-9)
    assert comparison.t_interval.high == pytest.approx(interval.high, rel=1e-9)


@given(st.lists(st.floats(-1, 1), min_size=MINIMUM_SEEDS, max_size=9))
@settings(max_examples=15, deadline=None)
def test_intervals_hold_the_mean_whatever_the_differences(values: list[float]) -> None:
    comparison = paired(values)
    if not comparison.sd:
        assert comparison.t_interval is None and comparison.p_value is None
        return
    interval = comparison.t_interval
    assert interval is not None and math.isfinite(interval.low) and math.isfinite(interval.high)
    assert interval.low <= comparison.mean <= interval.high
    # A t-interval excludes zero exactly when its test rejects.
    assert comparison.t_interval is not None and comparison.p_value is not None
    assert (comparison.t_interval.low <= 0 <= comparison.t_interval.high) == (comparison.p_value >= 0.05)


def test_below_five_seeds_nothing_is_inferred_but_the_design_is_judged() -> None:
    for n in range(2, MINIMUM_SEEDS):
        comparison = paired(differences()[:n])
        assert comparison.smallest_resolvable is not None and comparison.smallest_resolvable > 0
        assert comparison.t_interval is None
        assert comparison.p_value is None


def test_one_seed_has_a_difference_and_no_spread() -> None:
    comparison = paired([-0.25])
    assert (comparison.n, comparison.mean, comparison.sd, comparison.smallest_resolvable) == (1, -0.25, None, None)
    assert "nothing follows" in verdict(comparison)


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3])
def test_seeds_that_do_not_vary_support_no_inference(value: float) -> None:
    # 0.1 + 1.7 - 1.7 and the like differ in the last bit: rounding is no spread.
    comparison = paired([value + base - base for base in (1.7, 1.3, 2.9, 1.1, 0.4, 1.9)])
    assert comparison.sd == 0
    assert comparison.t_interval is None and comparison.p_value is None and comparison.smallest_resolvable is None
    assert "did not vary" in verdict(comparison)
    assert not comparison.separated


@pytest.mark.parametrize("values", [[], [math.nan], [0.1, math.inf], [0.1, 0.2, 0.3, 0.4, math.nan]])
def test_absent_or_non_finite_differences_are_refused(values: list[float]) -> None:
    with pytest.raises(UserError, match="at least one finite difference"):
        paired(values)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 30])
def test_smallest_resolvable_difference_has_power_eighty_percent(n: int) -> None:
    true, sd = smallest_resolvable(0.04, n), 0.04
    power = stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, true / sd * math.sqrt(n))
    assert power == pytest.approx(0.8, abs=1e-5)
    samples = np.random.default_rng(0).normal(true, sd, (40_000, n))
    t = samples.mean(1) / samples.std(1, ddof=1) * math.sqrt(n)
    assert np.mean(t > stats.t.ppf(0.975, n - 1)) == pytest.approx(0.8, abs=0.01)


def test_smallest_resolvable_difference_agrees_with_its_approximations() -> None:
    def central(n: int) -> float:
        return float((stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) / math.sqrt(n))

    assert smallest_resolvable(1.0, 5) == pytest.approx(central(5), rel=0.02)
    assert smallest_resolvable(1.0, 3) > central(3)
    assert smallest_resolvable(1.0, 10_000) == pytest.approx((1.959964 + 0.841621) / 100, rel=1e-4)
    # By hand: 3.7611 (noncentrality for 4 degrees of freedom) * 0.05 / sqrt(5).
    assert smallest_resolvable(0.05, 5) == pytest.approx(0.0841, abs=1e-4)


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_for_cohens_effects(effect: float, n: int) -> None:
    # The paired t-test's sample sizes at 5 % and power 0.8, as G*Power and R's power.t.test(type = "paired") give them.
    assert seeds_needed(1.0, effect) == n
    assert seeds_needed(0.05, -0.05 * effect) == n


@given(st.floats(0.01, 1.0), st.floats(0.02, 1.0), st.sampled_from([0.5, 0.8, 0.95]))
@settings(max_examples=40, deadline=None)
def test_seeds_needed_is_the_fewest(sd: float, difference: float, power: float) -> None:
    n = seeds_needed(sd, difference, power)
    assert n >= MINIMUM_SEEDS
    assert smallest_resolvable(sd, n, power) <= difference
    assert n == MINIMUM_SEEDS or smallest_resolvable(sd, n - 1, power) > difference


def test_seeds_needed_extremes() -> None:
    assert seeds_needed(0.0, 0.01) == MINIMUM_SEEDS
    with pytest.raises(UserError, match="other than 0"):
        seeds_needed(0.1, 0.0)
    with pytest.raises(UserError, match="finite sd"):
        seeds_needed(math.nan, 0.1)
    with pytest.raises(UserError, match="first reduce the spread"):
        seeds_needed(1.0, 1e-6)
    with pytest.raises(UserError, match="more than 1,000,000 seeds: first reduce the spread"):
        seeds_needed(1e308, 1e-300)
    with pytest.raises(UserError, match="power"):
        seeds_needed(1.0, 0.1, 1.0)


def test_holm_by_hand() -> None:
    assert holm([]) == ()
    assert holm([0.03]) == (0.03,)
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04; never falling: 0.04, 0.06, 0.06, 0.06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx((0.06, 0.04, 0.06, 0.06))
    assert holm([0.6, 0.9]) == (1.0, 1.0)
    with pytest.raises(UserError, match="p-values"):
        holm([0.5, math.nan])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    rejected = set()
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] * (len(p_values) - rank) > 0.05:
            break
        rejected.add(int(index))
    assert rejected == {index for index, p in enumerate(adjusted) if p <= 0.05}


def comparison(low: float, high: float, adjusted_p: float | None = None) -> Comparison:
    return Comparison(
        n=5,
        mean=(low + high) / 2,
        sd=0.02,
        smallest_resolvable=0.03,
        t_interval=Interval(low=low, high=high),
        p_value=0.01,
        adjusted_p=adjusted_p,
    )


def test_verdict_never_says_more_than_the_numbers() -> None:
    three = paired([-0.02, -0.01, -0.03])
    text = verdict(three)
    assert text.startswith("no interval from 3 seeds") and f"{three.smallest_resolvable:.4f} nats" in text
    assert "lower" not in text and "higher" not in text

    null = verdict(comparison(-0.01, 0.02))
    assert null == "not separated; differences beyond [-0.0100, +0.0200] nats are excluded (95 %)"
    assert verdict(comparison(0.0, 0.02)).startswith("not separated")

    assert verdict(comparison(-0.03, -0.01)) == "lower by 0.0200 nats (95 % interval 0.0100 to 0.0300)"
    assert verdict(comparison(0.01, 0.03, 0.04)) == "higher by 0.0200 nats (95 % interval 0.0100 to 0.0300)"
    assert "not separated after Holm's correction (p = 0.08)" in verdict(comparison(-0.03, -0.01, 0.08))


def test_separated_agrees_with_the_verdict() -> None:
    cases = [comparison(-0.01, 0.02), comparison(-0.03, -0.01), comparison(-0.03, -0.01, 0.08), paired([-1.0, -1.1])]
    for case in cases:
        text = verdict(case)
        assert case.separated == (text.startswith(("lower", "higher")) and "not separated" not in text)
    assert not dataclasses.replace(cases[1], t_interval=None).separated


def test_without_scipy_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from deepdelta.errors import UserError\n"
        "from deepdelta.lab.analysis.statistics import paired\n"
        "assert paired([0.1]).mean == 0.1\n"
        "try: paired([0.1, 0.2])\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "extra 'lab'" in done.stdout and 'pip install -e ".[lab]"' in done.stdout

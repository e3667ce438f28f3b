"""Seed-paired statistics: what a difference between a condition and the baseline does and does not show.

Runs of one seed share their data order, so the difference condition - baseline of one seed is the unit of analysis.
Intervals and p-values are given from MINIMUM_SEEDS seeds on; the smallest difference a design could have
resolved is given from two seeds on, because that is what a small study honestly tells.
"""

import math
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any, TypeVar

import numpy as np

from deepdelta.errors import UserError, without_extra
from deepdelta.lab.analysis.comparison import MINIMUM_SEEDS, Comparison, Estimate, Interval

MOST_SEEDS = 1_000_000
CONFIDENCE = 0.95
POWER = 0.8

K = TypeVar("K", bound=Hashable)


def paired(differences: Sequence[float], *, least: int = MINIMUM_SEEDS) -> Comparison:
    """What the differences condition - baseline, one per seed, show.

    The interval, given from `least` differences on, is mean ± t_{0.975, n-1} sd / sqrt(n). A spread of rounding errors
    only counts as sd = 0.

    Raises:
        UserError: no difference, or one that is not finite.
    """
    n = len(differences)
    if n == 0 or not all(map(math.isfinite, differences)):
        raise UserError(f"a comparison needs at least one finite difference and no other, got {list(differences)}")
    sd = stdev(differences) if n > 1 else None
    if sd is not None and sd <= max(1e-12 * max(map(abs, differences)), 1e-100):
        sd = 0.0
    comparison = Comparison(
        n=n,
        mean=fmean(differences),
        sd=sd,
        smallest_resolvable=smallest_resolvable(sd, n) if sd else None,
        t_interval=None,
        p_value=None,
    )
    if not sd or n < least:
        return comparison
    test = load_scipy().stats.ttest_1samp(differences, 0.0)
    low, high = map(float, test.confidence_interval(CONFIDENCE))
    return replace(comparison, t_interval=Interval(low=low, high=high), p_value=float(test.pvalue))


def estimate(by_seed: Sequence[float]) -> Estimate:
    """Their mean with its t-interval, as `paired` gives it."""
    found = paired(by_seed)
    return Estimate(mean=found.mean, interval=found.t_interval)


def family(differences: Mapping[K, Mapping[int, float]]) -> dict[K, Comparison]:
    """The comparison of each set of differences by seed but empty ones, with Holm's correction over all of them."""
    found = {key: paired(list(by_seed.values())) for key, by_seed in differences.items() if by_seed}
    tested = {key: one.p_value for key, one in found.items() if one.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {key: replace(one, adjusted_p=adjusted.get(key)) for key, one in found.items()}


def smallest_resolvable(sd: float, n: int, power: float = POWER) -> float:
    """The true mean difference that n paired seeds with spread `sd` find with probability `power`.

    Exact: the noncentrality c with P(T_{n-1}(c) > t_{0.975, n-1}) = power, times sd / sqrt(n). Finding means that a
    two-sided t-test at 5 % rejects on the right side. For large n this is the familiar (1.96 + 0.84) sd / sqrt(n).
    """
    if n < 2 or not sd >= 0:
        raise UserError(f"the resolvable difference needs n >= 2 and sd >= 0, got n = {n}, sd = {sd}")
    if not 0.05 < power < 1:
        raise UserError(f"power must lie between 0.05 and 1, got {power}")
    special = load_scipy().special
    critical = special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)
    return float(special.nctdtrinc(n - 1, 1 - power, critical)) * sd / math.sqrt(n)


def seeds_needed(sd: float, difference: float, power: float = POWER) -> int:
    """The fewest seeds, never under MINIMUM_SEEDS, whose smallest resolvable difference is at most `difference`.

    Args:
        sd: spread of the paired differences, from a pilot, in nats.
        difference: the true difference that matters, in nats; its sign is ignored.
    """
    difference = abs(difference)
    if not (math.isfinite(sd) and sd >= 0 and math.isfinite(difference) and difference > 0):
        raise UserError(f"needs a finite sd >= 0 and a finite difference other than 0, got {sd} and {difference}")
    candidates = range(MINIMUM_SEEDS, MOST_SEEDS + 1)
    found = bisect_left(candidates, True, key=lambda n: smallest_resolvable(sd, n, power) <= difference)
    if found == len(candidates):
        raise UserError(
            f"resolving {difference} nats with a spread of {sd} takes more than {MOST_SEEDS:,} seeds: first reduce the "
            "spread"
        )
    return candidates[found]


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's (1979) step-down adjusted p-values, in the order given.

    With the m values sorted, p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j)): comparing these with 5 % keeps
    the chance of any false finding among all m at 5 %, whatever their dependence.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise UserError(f"p-values must lie in [0, 1], got {list(p_values)}")
    p, order = np.array(p_values), np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]))
    return tuple(adjusted.tolist())


def load_scipy() -> Any:
    """The package scipy, imported on use: the command line must start fast, and everything else works without it.

    Raises:
        UserError: the extra `lab` is not installed.
    """
    try:
        import scipy.optimize
        import scipy.special
        import scipy.stats
    except ModuleNotFoundError as error:
        raise without_extra("statistics", "lab", error) from None
    return scipy

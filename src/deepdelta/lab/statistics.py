"""Seed-paired statistics: what a difference between a condition and the baseline does and does not show.

Runs of one seed share their data order, so the difference condition - baseline of one seed is the unit of analysis.
Intervals and p-values are given from MINIMUM_SEEDS seeds on; the smallest difference a design could have
resolved is given from two seeds on, because that is what a small study honestly tells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepdelta.errors import UserError, without_extra

MOST_SEEDS = 1_000_000
MINIMUM_SEEDS = 5
CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Paired differences condition - baseline in nats per token; negative means that the condition has lower loss.

    Fields:
        sd: sample standard deviation of the differences (n - 1); None for one difference.
        smallest_resolvable: true difference found with probability 0.8 by a two-sided t-test at 5 % (see
            `smallest_resolvable`), with `sd` taken as the true spread; None for n < 2 or sd = 0.
        t_interval: 95 %; None below MINIMUM_SEEDS or for sd = 0, as `p_value`: two-sided, paired t-test.
        adjusted_p: `p_value` after Holm's correction over a study's comparisons; None for a comparison on its own.
    """

    n: int
    mean: float
    sd: float | None
    smallest_resolvable: float | None
    t_interval: Interval | None
    p_value: float | None
    adjusted_p: float | None = None


def paired(differences: Sequence[float]) -> Comparison:
    """What the differences condition - baseline, one per seed, show.

    The t-interval is mean ± t_{0.975, n-1} sd / sqrt(n). A spread of rounding errors only counts as sd = 0.

    Raises:
        UserError: no difference, or one that is not finite.
    """
    n = len(differences)
    if n == 0 or not all(map(math.isfinite, differences)):
        raise UserError(f"a comparison needs at least one finite difference and no other, got {list(differences)}")
    mean = math.fsum(differences) / n
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1)) if n > 1 else None
    if sd is not None and sd <= 1e-12 * max(map(abs, differences)):
        sd = 0.0
    comparison = Comparison(
        n=n,
        mean=mean,
        sd=sd,
        smallest_resolvable=smallest_resolvable(sd, n) if sd else None,
        t_interval=None,
        p_value=None,
    )
    if not sd or n < MINIMUM_SEEDS:
        return comparison
    scipy = load_scipy()
    error = sd / math.sqrt(n)
    reach = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return replace(
        comparison,
        t_interval=Interval(low=mean - reach, high=mean + reach),
        p_value=float(2 * scipy.stats.t.sf(abs(mean) / error, n - 1)),
    )


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
    # Were the spread known for certain, this many would do; the exact answer is the same or slightly more.
    known = smallest_resolvable(sd, 1_000_000, power) * 1_000
    if known / difference > MOST_SEEDS**0.5:
        raise UserError(
            f"resolving {difference} nats with a spread of {sd} takes more than {MOST_SEEDS:,} seeds: first reduce the "
            "spread"
        )
    n = max(MINIMUM_SEEDS, math.floor((known / difference) ** 2))
    while smallest_resolvable(sd, n, power) > difference:
        n += 1
    return n


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's (1979) step-down adjusted p-values, in the order given.

    With the m values sorted, p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j)): comparing these with 5 % keeps
    the chance of any false finding among all m at 5 %, whatever their dependence.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise UserError(f"p-values must lie in [0, 1], got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons, a family, with Holm's correction over those that have a p-value."""
    adjusted = iter(holm([c.p_value for c in comparisons if c.p_value is not None]))
    return [c if c.p_value is None else replace(c, adjusted_p=next(adjusted)) for c in comparisons]


def verdict(comparison: Comparison) -> str:
    """What the comparison with the baseline shows, in plain English and no more than that.

    A difference is called lower or higher only if its 95 % t-interval excludes zero and Holm's correction, where one
    was made, leaves it below 5 %.
    """
    c = comparison
    if c.n == 1:
        return f"no interval from 1 seed (difference {c.mean:+.4f} nats): one seed shows no spread, so nothing follows"
    if c.sd == 0:
        return f"all {c.n} paired differences equal {c.mean:+.4f} nats: the seeds did not vary, so nothing follows"
    if c.t_interval is None:
        return (
            f"no interval from {c.n} seeds (mean difference {c.mean:+.4f} nats); "
            f"this design could have resolved {c.smallest_resolvable:.4f} nats"
        )
    low, high = c.t_interval.low, c.t_interval.high
    if low <= 0 <= high:
        return f"not separated; differences beyond [{low:+.4f}, {high:+.4f}] nats are excluded (95 %)"
    side = "lower" if c.mean < 0 else "higher"
    near, far = sorted((abs(low), abs(high)))
    claim = f"{side} by {abs(c.mean):.4f} nats (95 % interval {near:.4f} to {far:.4f})"
    if c.adjusted_p is not None and c.adjusted_p >= 1 - CONFIDENCE:
        return f"{claim} taken alone, but not separated after Holm's correction (p = {c.adjusted_p:.2g})"
    return claim


def separated(comparison: Comparison) -> bool:
    """Whether `verdict` calls the condition lower or higher than the baseline."""
    c = comparison
    if c.t_interval is None or c.t_interval.low <= 0 <= c.t_interval.high:
        return False
    return c.adjusted_p is None or c.adjusted_p < 1 - CONFIDENCE


def load_scipy() -> Any:
    """The package scipy, imported on use: the command line must start fast, and everything else works without it.

    Raises:
        UserError: the extra `study` is not installed.
    """
    try:
        import scipy.optimize
        import scipy.special
        import scipy.stats
    except ModuleNotFoundError as error:
        raise without_extra("statistics", "study", error) from None
    return scipy

"""The record of a paired comparison: what every table and picture shows of a difference. No computation."""

from dataclasses import dataclass

MINIMUM_SEEDS = 5
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds, and its 95 % t-interval where there are MINIMUM_SEEDS of them."""

    mean: float
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Paired differences condition - reference in nats per token; negative means that the condition has lower loss.

    Fields:
        sd: sample standard deviation of the differences (n - 1); None for one difference.
        smallest_resolvable: true difference found with probability 0.8 by a two-sided t-test at 5 %, with `sd` taken
            as the true spread; None for n < 2 or sd = 0.
        t_interval: 95 %; None below MINIMUM_SEEDS or for sd = 0, as `p_value`: two-sided, paired t-test.
        adjusted_p: `p_value` after Holm's correction over a family of comparisons; None for one on its own.
    """

    n: int
    mean: float
    sd: float | None
    smallest_resolvable: float | None
    t_interval: Interval | None
    p_value: float | None
    adjusted_p: float | None = None

    @property
    def separated(self) -> bool:
        """Whether the interval excludes zero and Holm's correction, where one was made, leaves p below 5 %."""
        if self.t_interval is None or self.t_interval.low <= 0 <= self.t_interval.high:
            return False
        return self.adjusted_p is None or self.adjusted_p < SIGNIFICANT

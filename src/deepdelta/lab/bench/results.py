"""What a benchmark found, as frozen dataclasses: `results.json` is exactly this, and all that is shown comes from it.

Times in seconds, memory in bytes; a ratio above 1 is faster (or, for memory, larger) than what it refers to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from deepdelta.files import AnyPath
from deepdelta.lab.analysis.stored import Stored, load_stored
from deepdelta.lab.bench.config import Bar, Group

RESAMPLES = 9999
MINIMUM_ROUNDS = 5
"""Rounds from which an interval is given."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Over rounds: the median with its 95 % interval (percentile bootstrap; None for few rounds), and the extremes."""

    median: float
    low: float | None
    high: float | None
    minimum: float
    maximum: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A measure of one case."""

    seconds: tuple[float, ...]
    """Of each round, in the order of rounds, which all cases of the group share."""
    tokens_per_second: float
    """Of the median time."""
    ratio: Ratio
    """Throughput divided by the baseline's in the same round."""
    bytes_per_token: int | None = None
    """What must be moved at least, by formula; counted for the operator only, as the following."""
    flops_per_token: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    case: str
    code: str
    """What did the rewrites."""
    parameters: int
    timings: dict[str, Timing] = field(default_factory=dict)
    """By measure."""
    peak_bytes: int | None = None
    """Most memory of allocated tensors in a training step; None where it was not seen."""
    peak_ratio: float | None = None
    """peak_bytes divided by the baseline's."""
    moved: float | None = None
    """Numbers that the residual reads and writes per token and sublayer, forward, uncompiled, in units of d."""


@dataclass(frozen=True, kw_only=True)
class BarResult:
    bar: Bar
    ratio: Ratio
    """Of throughputs per round, or of peak memory (one number)."""

    @property
    def reached(self) -> bool:
        """Whether the median reaches the bar."""
        bar = self.bar
        low, high = bar.at_least or 0.0, float("inf") if bar.at_most is None else bar.at_most
        return low <= self.ratio.median <= high


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    group: Group
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    """Cases that cannot run here, with the reason."""
    bars: tuple[BarResult, ...]

    def row(self, case: str) -> Row:
        return next(row for row in self.rows if row.case == case)


@dataclass(frozen=True, kw_only=True)
class BenchResults(Stored):
    suite: str
    question: str
    quick: bool
    """Run at reduced sizes: no measurement of the bar."""
    date: str
    """UTC, ISO 8601, of the beginning."""
    device: str
    precision: str
    threads: int
    rounds: int
    checks: tuple[str, ...]
    """What was compared before anything was timed, and by how much it differed."""
    groups: tuple[GroupResult, ...]


def ratio_of(baseline: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """The throughput ratio of a case to its baseline from their times in the same rounds."""
    ratios = np.array(baseline) / np.array(seconds)
    low = high = None
    if len(ratios) >= MINIMUM_ROUNDS:
        resampled = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
        low, high = map(float, np.quantile(np.median(resampled, axis=1), (0.025, 0.975)))
    return Ratio(
        median=float(np.median(ratios)), low=low, high=high, minimum=float(ratios.min()), maximum=float(ratios.max())
    )


def timing_of(
    seconds: Sequence[float],
    baseline: Sequence[float],
    tokens: int,
    bytes_per_token: int | None = None,
    flops_per_token: int | None = None,
) -> Timing:
    return Timing(
        seconds=tuple(seconds),
        tokens_per_second=tokens / float(np.median(seconds)),
        ratio=ratio_of(baseline, seconds),
        bytes_per_token=bytes_per_token,
        flops_per_token=flops_per_token,
    )


def bars_of(group: Group, rows: Sequence[Row]) -> tuple[BarResult, ...]:
    """The group's bars whose two cases were both measured."""
    by_case = {row.case: row for row in rows}
    found = []
    for bar in group.bars:
        one, other = by_case.get(bar.case), by_case.get(bar.against)
        if one is None or other is None:
            continue
        if bar.measure != "peak":
            ratio = ratio_of(other.timings[bar.measure].seconds, one.timings[bar.measure].seconds)
        elif one.peak_bytes is None or other.peak_bytes is None:
            continue
        else:
            peak = one.peak_bytes / other.peak_bytes
            ratio = Ratio(median=peak, low=None, high=None, minimum=peak, maximum=peak)
        found.append(BarResult(bar=bar, ratio=ratio))
    return tuple(found)


def load_results(path: AnyPath) -> BenchResults:
    """Results as they were saved.

    Raises:
        UserError: no such file, or one that holds no results of this format.
    """
    return load_stored(BenchResults, path, "deepdelta bench")

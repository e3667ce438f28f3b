"""What a task's runs gave and what its analysis found: `results.json` of a task is exactly this."""

from collections.abc import Mapping
from dataclasses import dataclass

from deepdelta.lab.analysis.comparison import Estimate
from deepdelta.lab.analysis.comparisons import contrasts
from deepdelta.lab.analysis.results import Contrast
from deepdelta.lab.analysis.statistics import estimate
from deepdelta.lab.analysis.stored import Stored

Metrics = dict[str, float | None]
"""By name; None where a number is not finite."""


@dataclass(frozen=True, kw_only=True)
class ConditionMetrics:
    """A condition's metrics by seed; `diverged` are the seeds without: no mean and no comparison has them.

    Fields:
        means: over seeds, of the metrics that are finite at every seed which has them.
    """

    name: str
    summary: str
    control: str | None
    metrics: dict[int, Metrics]
    diverged: tuple[int, ...] = ()
    means: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class TaskResults(Stored):
    """All of a task's runs, and the comparisons of the primary metric. Times are ISO 8601."""

    task: str
    summary: str
    primary: str
    unit: str
    higher_is_better: bool
    baseline: str
    seeds: tuple[int, ...]
    finished: str
    conditions: tuple[ConditionMetrics, ...]
    contrasts: tuple[Contrast, ...]
    refuted: str = ""
    """What would refute the hope behind the task, as its file had it."""
    left_out: tuple[str, ...] = ()
    """Conditions of the task that were not chosen."""
    made: tuple[str, ...] = ()
    """Where the runs were made, where not all of them at the commit and on the machine of these results."""


def means(metrics: Mapping[int, Metrics]) -> dict[str, Estimate]:
    """Of every metric that is finite wherever it was measured, in the order in which the metrics first come."""
    found = {}
    for name in dict.fromkeys(name for one in metrics.values() for name in one):
        values = [one[name] for one in metrics.values() if name in one]
        if (finite := [value for value in values if value is not None]) == values:
            found[name] = estimate(finite)
    return found


def task_contrasts(conditions: Mapping[str, ConditionMetrics], baseline: str, primary: str) -> tuple[Contrast, ...]:
    """Of the primary metric. A condition with a number that is not finite has none: what failed would be left out."""
    values = {
        name: {seed: value for seed, one in own.metrics.items() if (value := one[primary]) is not None}
        if primary in own.means
        else {}
        for name, own in conditions.items()
    }
    return contrasts({name: own.control for name, own in conditions.items()}, baseline, values)

"""What a task's runs gave, as frozen dataclasses, and the comparisons and tables made of them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from deepdelta.lab.statistics import MINIMUM_SEEDS, Comparison, corrected, paired
from deepdelta.lab.tasks.task import Task
from deepdelta.lab.views.tables import ABSENT, Cells, Column, markdown_page, render_cells
from deepdelta.provenance import Provenance

HEADINGS = ("condition", "seeds", "{primary}", "by seed", "change to {baseline}", "95 %", "change to control", "95 %")

NOT_FINITE, DIVERGED = "not finite", "diverged"

Metrics = dict[str, float | None]
"""By name; None where a number is not finite."""


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """One finished run, `name` its condition and seed: never made again while its settings are the same.

    `diverged` says how its training went where its loss was no longer finite; then there are no metrics.
    """

    name: str
    task: str
    condition: str
    seed: int
    settings: dict[str, Any]
    metrics: Metrics
    seconds: float
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, str]
    finished: str
    diverged: str | None = None


@dataclass(frozen=True, kw_only=True)
class ConditionMetrics:
    """A condition's metrics by seed, and how it compares in the primary one: a difference per seed, paired.

    `diverged` are the seeds whose runs have no metrics: no mean and no comparison has them.
    """

    name: str
    summary: str
    control: str | None
    metrics: dict[int, Metrics]
    against_baseline: Comparison | None
    against_control: Comparison | None
    diverged: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskResults(Provenance):
    """All of a task's runs. Times are ISO 8601."""

    task: str
    summary: str
    primary: str
    unit: str
    higher_is_better: bool
    baseline: str
    seeds: tuple[int, ...]
    finished: str
    conditions: tuple[ConditionMetrics, ...]


def conditions_of(task: Task, records: Mapping[tuple[str, int], TaskRecord]) -> tuple[ConditionMetrics, ...]:
    """The conditions with their comparisons; Holm's correction runs over all of the task's comparisons."""
    by_name: dict[str, dict[int, Metrics]] = {}
    for (name, seed), record in sorted(records.items()):
        if record.diverged is None:
            by_name.setdefault(name, {})[seed] = record.metrics
    pairs = [
        (name, other)
        for name, variant in task.conditions.items()
        for other in (task.baseline, variant.control)
        if other is not None and other != name
    ]
    found = {pair: comparison for pair in pairs if (comparison := _compared(task, by_name, *pair)) is not None}
    compared = dict(zip(found, corrected(list(found.values())), strict=True))
    return tuple(
        ConditionMetrics(
            name=name,
            summary=variant.summary,
            control=variant.control,
            metrics=by_name.get(name, {}),
            against_baseline=compared.get((name, task.baseline)),
            against_control=None if variant.control is None else compared.get((name, variant.control)),
            diverged=tuple(seed for (own, seed), record in sorted(records.items()) if own == name and record.diverged),
        )
        for name, variant in task.conditions.items()
    )


def _compared(task: Task, by_name: Mapping[str, Mapping[int, Metrics]], one: str, other: str) -> Comparison | None:
    first, second = by_name.get(one, {}), by_name.get(other, {})
    shared = [seed for seed in first if seed in second]
    ours, theirs = (_finite([by_seed[seed][task.primary] for seed in shared]) for by_seed in (first, second))
    # With a run that has no finite number there is no comparison: those that failed would be left out of it.
    return paired([a - b for a, b in zip(ours, theirs, strict=True)]) if ours and theirs else None


def _finite(values: Sequence[float | None]) -> list[float] | None:
    """The values, or None where one of them is not finite."""
    found = [value for value in values if value is not None]
    return found if len(found) == len(values) else None


def table(results: TaskResults) -> Table:
    """For the terminal."""
    return render_cells(main_table(results))


def markdown(results: TaskResults) -> str:
    tables = replace(main_table(results), title=""), measured(results)
    return markdown_page(title(results), (results.facts(results.finished),), tables)


def main_table(results: TaskResults) -> Cells:
    """A row per condition: the primary number and its comparisons."""
    names = (heading.format(primary=results.primary, baseline=results.baseline) for heading in HEADINGS)
    rows = tuple(_row(condition, results.primary) for condition in results.conditions)
    diverged = ", ".join(f"{one.name} seed {seed}" for one in results.conditions for seed in one.diverged)
    return Cells(
        title=title(results),
        columns=tuple(Column(title=name) for name in names),
        rows=rows,
        notes=(f"Diverged, and left out of means and comparisons: {diverged}.",) if diverged else (),
    )


def measured(results: TaskResults) -> Cells:
    """A row per number, in the order in which the task gives them: of a sweep, size by size."""
    names = dict.fromkeys(name for one in results.conditions for metrics in one.metrics.values() for name in metrics)
    return Cells(
        title="Everything measured",
        columns=tuple(Column(title=name) for name in ("measured", *(one.name for one in results.conditions))),
        rows=tuple((name, *(_mean(condition, name) for condition in results.conditions)) for name in names),
        notes=(f"Means over seeds, from {MINIMUM_SEEDS} seeds on with their 95 % t-interval.",),
    )


def title(results: TaskResults) -> str:
    better = "higher is better" if results.higher_is_better else "lower is better"
    return f"{results.task}: {results.summary} ({results.primary}, {results.unit}, {better})"


def _row(condition: ConditionMetrics, primary: str) -> tuple[str, ...]:
    values = {seed: one[primary] for seed, one in condition.metrics.items()}
    finite = _finite([*values.values()])
    by_seed = {seed: NOT_FINITE if value is None else f"{value:.4f}" for seed, value in values.items()}
    return (
        condition.name,
        str(len(values)),
        NOT_FINITE if finite is None else f"{statistics.fmean(finite):.4f}" if finite else ABSENT,
        " ".join(text for _, text in sorted((by_seed | dict.fromkeys(condition.diverged, DIVERGED)).items())),
        *_comparison(condition.against_baseline),
        *_comparison(condition.against_control),
    )


def _comparison(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return ABSENT, ABSENT
    change = f"{comparison.mean:+.4f}"
    if comparison.t_interval is None:
        return change, "no interval"
    interval = f"{comparison.t_interval.low:+.4f} to {comparison.t_interval.high:+.4f}"
    return change, f"{interval}, p = {comparison.adjusted_p:.2g}" if comparison.adjusted_p is not None else interval


def _mean(condition: ConditionMetrics, name: str) -> str:
    values = [one[name] for one in condition.metrics.values() if name in one]
    if not values:
        return ABSENT
    if (finite := _finite(values)) is None:
        return NOT_FINITE
    found = paired(finite)
    reach = "" if found.t_interval is None else f" ± {found.t_interval.high - found.mean:.2g}"
    return f"{found.mean:.4g}{reach}"

"""What a task's runs gave, as frozen dataclasses, and the comparisons and tables made of them."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from deepdelta.studies.statistics import MINIMUM_SEEDS, Comparison, corrected, paired
from deepdelta.tasks.task import Task
from deepdelta.training.environment import Provenance

HEADINGS = ("condition", "seeds", "{primary}", "by seed", "change to {baseline}", "95 %", "change to control", "95 %")


@dataclass(frozen=True, kw_only=True)
class TaskCell:
    """One finished run: never made again while its settings are the same."""

    task: str
    condition: str
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, float]
    seconds: float
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, str]
    finished: str


@dataclass(frozen=True, kw_only=True)
class ConditionMetrics:
    """A condition's metrics by seed, and how it compares in the primary one: a difference per seed, paired."""

    name: str
    summary: str
    control: str | None
    metrics: dict[int, dict[str, float]]
    against_baseline: Comparison | None
    against_control: Comparison | None


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


def conditions_of(task: Task, cells: Mapping[tuple[str, int], TaskCell]) -> tuple[ConditionMetrics, ...]:
    """The conditions with their comparisons; Holm's correction runs over all of the task's comparisons."""
    by_name: dict[str, dict[int, dict[str, float]]] = {}
    for (name, seed), cell in sorted(cells.items()):
        by_name.setdefault(name, {})[seed] = cell.metrics
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
        )
        for name, variant in task.conditions.items()
    )


def _compared(task: Task, by_name: Mapping[str, Mapping[int, Mapping[str, float]]], one: str, other: str) -> Any:
    first, second = by_name.get(one, {}), by_name.get(other, {})
    differences = [first[seed][task.primary] - second[seed][task.primary] for seed in first if seed in second]
    return paired(differences) if differences and all(map(math.isfinite, differences)) else None


def table(results: TaskResults) -> Table:
    """For the terminal."""
    made = Table(title=title(results))
    for heading in headings(results):
        made.add_column(heading)
    for row in rows(results):
        made.add_row(*row)
    return made


def markdown(results: TaskResults) -> str:
    # In the order in which the task gives them: of a sweep, size by size.
    names = dict.fromkeys(name for one in results.conditions for metrics in one.metrics.values() for name in metrics)
    more = _lines(
        ["measured", *(condition.name for condition in results.conditions)],
        [[name, *(_mean(condition, name) for condition in results.conditions)] for name in names],
    )
    return (
        f"# {title(results)}\n\n{results.facts(results.finished)}\n\n{_lines(headings(results), rows(results))}\n\n"
        f"Everything measured, means over seeds, from {MINIMUM_SEEDS} seeds on with their 95 % t-interval:\n\n{more}\n"
    )


def _lines(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, ["---"] * len(heading), *rows])


def title(results: TaskResults) -> str:
    better = "higher is better" if results.higher_is_better else "lower is better"
    return f"{results.task}: {results.summary} ({results.primary}, {results.unit}, {better})"


def headings(results: TaskResults) -> list[str]:
    return [heading.format(primary=results.primary, baseline=results.baseline) for heading in HEADINGS]


def rows(results: TaskResults) -> list[list[str]]:
    made = []
    for condition in results.conditions:
        values = [one[results.primary] for one in condition.metrics.values()]
        made.append(
            [
                condition.name,
                str(len(values)),
                f"{statistics.fmean(values):.4f}" if values else "-",
                " ".join(f"{value:.4f}" for value in values),
                *_comparison(condition.against_baseline),
                *_comparison(condition.against_control),
            ]
        )
    return made


def _comparison(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return "-", "-"
    change = f"{comparison.mean:+.4f}"
    if comparison.t_interval is None:
        return change, "no interval"
    interval = f"{comparison.t_interval.low:+.4f} to {comparison.t_interval.high:+.4f}"
    return change, f"{interval}, p = {comparison.adjusted_p:.2g}" if comparison.adjusted_p is not None else interval


def _mean(condition: ConditionMetrics, name: str) -> str:
    values = [one[name] for one in condition.metrics.values() if name in one]
    if not values:
        return "-"
    found = paired(values)
    reach = "" if found.t_interval is None else f" ± {found.t_interval.high - found.mean:.2g}"
    return f"{found.mean:.4g}{reach}"

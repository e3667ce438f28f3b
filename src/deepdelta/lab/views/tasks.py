"""The tables of a task: its primary number by seed, the comparisons, and everything measured."""

from dataclasses import replace

from deepdelta.lab.analysis.comparison import MINIMUM_SEEDS
from deepdelta.lab.analysis.tasks import ConditionMetrics, TaskResults
from deepdelta.lab.views.tables import (
    ABSENT,
    Column,
    TextTable,
    comparison_columns,
    markdown_page,
    table_of,
)

NOT_FINITE = "not finite"


def task_markdown(results: TaskResults) -> str:
    """All tables as a page, with what their figures depend on."""
    first, *others = task_tables(results)
    return markdown_page(first.title, (results.facts(results.finished),), (replace(first, title=""), *others))


def task_tables(results: TaskResults) -> tuple[TextTable, TextTable, TextTable]:
    """A row per condition; a row per comparison; and a row per number, in the order in which the task gives them."""
    return _primary(results), _contrasts(results), _measured(results)


def _primary(results: TaskResults) -> TextTable:
    primary = results.primary

    def mean(one: ConditionMetrics) -> str:
        if not one.metrics:
            return ABSENT
        return f"{one.means[primary].mean:.4f}" if primary in one.means else NOT_FINITE

    def by_seed(one: ConditionMetrics) -> str:
        values = {seed: metrics[primary] for seed, metrics in one.metrics.items()}
        texts = {seed: NOT_FINITE if value is None else f"{value:.4f}" for seed, value in values.items()}
        return " ".join(text for _, text in sorted((texts | dict.fromkeys(one.diverged, "diverged")).items()))

    columns = [
        Column("condition", "", lambda one: one.name),
        Column("seeds", "", lambda one: str(len(one.metrics))),
        Column(primary, "", mean),
        Column("by seed", "", by_seed, spare=1),
    ]
    better = "higher is better" if results.higher_is_better else "lower is better"
    notes = [f"Refuted if {results.refuted}."] if results.refuted else []
    notes += [f"Runs: {'; '.join(results.made)}."] if results.made else []
    diverged = ", ".join(f"{one.name} seed {seed}" for one in results.conditions for seed in one.diverged)
    return table_of(
        results.conditions,
        columns,
        title=f"{results.task}: {results.summary} ({primary}, {results.unit}, {better})",
        notes=notes + ([f"Diverged, and left out of means and comparisons: {diverged}."] if diverged else []),
    )


def _contrasts(results: TaskResults) -> TextTable:
    columns = [
        Column("condition", "", lambda one: one.condition),
        Column("compared with", "", lambda one: one.reference),
        *comparison_columns(lambda one: one.comparison, unit=""),
    ]
    title = "Comparisons with the baseline and with controls"
    notes = [f"Changes of {results.primary}."]
    if results.left_out:
        notes.append(f"p is corrected over these alone; not chosen were {', '.join(results.left_out)}.")
    return table_of(results.contrasts, columns, title=title, notes=notes)


def _measured(results: TaskResults) -> TextTable:
    def mean(condition: ConditionMetrics, name: str) -> str:
        if not any(name in one for one in condition.metrics.values()):
            return ABSENT
        if (found := condition.means.get(name)) is None:
            return NOT_FINITE
        reach = "" if found.interval is None else f" ± {found.interval.high - found.mean:.2g}"
        return f"{found.mean:.4g}{reach}"

    names = dict.fromkeys(name for one in results.conditions for metrics in one.metrics.values() for name in metrics)
    return TextTable(
        title="Everything measured",
        columns=tuple(Column(name) for name in ("measured", *(one.name for one in results.conditions))),
        rows=tuple((name, *(mean(condition, name) for condition in results.conditions)) for name in names),
        notes=(f"Means over seeds, from {MINIMUM_SEEDS} seeds on with their 95 % t-interval.",),
    )

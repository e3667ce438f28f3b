"""The main table of a study, a row per condition."""

from dataclasses import replace

from rich.table import Table

from deepdelta.lab.analysis.contrasts import compare
from deepdelta.lab.analysis.results import ConditionResult, StudyResults
from deepdelta.lab.statistics import MINIMUM_SEEDS, Comparison, Interval, seeds_needed
from deepdelta.lab.views.tables import ABSENT, Cells, Column, markdown_cells, render_cells


def table_cells(results: StudyResults) -> Cells:
    """All that the table says. Columns of intervals exist only if some comparison has enough seeds for them."""
    comparisons = compare(results)
    intervals = any(c.t_interval is not None for c in comparisons.values())
    costs = any(condition.cost for condition in results.conditions)
    columns = [
        Column(title="condition", help="What was trained; see the list of conditions."),
        Column(title="loss", help="Mean validation loss over finished seeds, nats per token. Lower is better."),
        Column(title="by seed", help=f"Validation loss of seed {', '.join(map(str, results.seeds))}.", spare=9),
        Column(title="change", help=f"Mean over seeds of condition minus {results.baseline}, same seed and data."),
        Column(
            title="resolves",
            help="Smallest true difference that this many seeds with this spread find in 4 of 5 studies (5 % level). "
            "The spread is itself estimated from these seeds.",
            spare=4,
        ),
    ]
    if intervals:
        columns += [
            Column(title="95 %\ninterval", help="Of the change: Student's t on the paired seeds."),
            Column(title="p\n(Holm)", help="Two-sided paired t-test, corrected for the number of comparisons."),
        ]
    if any(condition.tuned for condition in results.conditions):
        columns.append(Column(title="lr", help="The learning rate, tuned per condition; 'edge': of the grid.", spare=1))
    columns += [
        Column(title="params", help="Trained parameters.", spare=6),
        Column(
            title="FLOPs", help="Per token of training, forward and backward; and relative to the baseline.", spare=5
        ),
    ]
    if costs:
        columns += [
            Column(
                title="speed",
                help="Tokens/s relative to the baseline: median and extremes of interleaved rounds.",
                spare=2,
            ),
            Column(
                title="memory", help="Peak of allocated tensors in a training step relative to the baseline.", spare=3
            ),
        ]
    rows = tuple(
        _row(results, condition, comparisons.get(condition.name), intervals, costs) for condition in results.conditions
    )
    assert all(len(row) == len(columns) for row in rows)
    return Cells(columns=tuple(columns), rows=rows, notes=_notes(results, intervals, costs))


def render_table(results: StudyResults, width: int | None = None) -> Table:
    """The main table for a terminal of so many columns; None: this one."""
    bold = [number for number, condition in enumerate(results.conditions) if condition.name == results.baseline]
    return render_cells(replace(table_cells(results), title=results.name), bold, width)


def markdown_table(results: StudyResults) -> str:
    """The main table as GitHub-flavoured Markdown, with its notes below."""
    return markdown_cells(table_cells(results))


def si(value: float | int) -> str:
    """Three significant digits with a metric prefix: 812345 is '812 k'."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {prefix}"
    return f"{value:.3g}"


def _row(
    results: StudyResults, condition: ConditionResult, comparison: Comparison | None, intervals: bool, costs: bool
) -> tuple[str, ...]:
    losses = condition.losses()
    is_baseline = condition.name == results.baseline
    ended = {run.seed for run in condition.runs}
    by_seed = [
        f"{losses[seed]:.4f}" if seed in losses else "diverged" if seed in ended else ABSENT for seed in results.seeds
    ]
    row = [
        condition.name + ("\n(baseline)" if is_baseline else ""),
        f"{sum(losses.values()) / len(losses):.4f}" if losses else ABSENT,
        "\n".join(by_seed),
        _difference(comparison, len(results.seeds)),
        f"{comparison.smallest_resolvable:.4f}" if comparison and comparison.smallest_resolvable else ABSENT,
    ]
    if intervals:
        row += [
            interval_text(comparison.t_interval if comparison else None),
            ABSENT if comparison is None or comparison.adjusted_p is None else f"{comparison.adjusted_p:.2g}",
        ]
    if any(other.tuned for other in results.conditions):
        tuned = condition.tuned
        row.append(ABSENT if tuned is None else f"{tuned.lr:g}\n(edge)" if tuned.edge else f"{tuned.lr:g}")
    ratio = condition.flops_per_token / results.condition(results.baseline).flops_per_token
    row += [si(condition.parameters), f"{si(condition.flops_per_token)}\n({ratio:.2f}x)"]
    if costs:
        cost = condition.cost
        row += [
            f"{cost.speed_ratio:.2f}x\n{cost.speed_ratio_low:.2f}-{cost.speed_ratio_high:.2f}" if cost else ABSENT,
            f"{cost.peak_ratio:.2f}x" if cost else ABSENT,
        ]
    return tuple(row)


def _difference(comparison: Comparison | None, planned: int) -> str:
    if comparison is None:
        return ABSENT
    few = "" if comparison.n == planned else f"\n({comparison.n} of {planned})"
    return f"{comparison.mean:+.4f}{few}"


def interval_text(interval: Interval | None) -> str:
    return f"{interval.low:+.4f}\nto {interval.high:+.4f}" if interval else ABSENT


def _notes(results: StudyResults, intervals: bool, costs: bool) -> tuple[str, ...]:
    notes = [
        "Losses in nats per token on held-out text; a negative change means a lower loss than the baseline's.",
    ]
    if not intervals:
        notes.append(f"No intervals: they are given from {MINIMUM_SEEDS} paired seeds on.")
    if not costs:
        notes.append("Speed and memory were not measured.")
    if any(run.validation_loss is None for condition in results.conditions for run in condition.runs):
        notes.append("A diverged run is in no mean and no change.")
    if results.budgets != ("tokens",):
        notes.append(f"All conditions at equal {results.budgets[0]}.")
    if (steps := results.budget.start_steps) is not None:
        notes.append(f"All runs of a seed go on from the weights of one run of {steps:,} steps, not counted.")
    return (*notes, *notes_of_design(results))


def notes_of_design(results: StudyResults) -> tuple[str, ...]:
    """What every table of the study says about its number of seeds."""
    if results.power is None:
        return ("Exploratory.",) if results.exploratory else ()
    sd, difference = results.power.pilot_sd, results.power.difference
    needed = seeds_needed(sd, difference)
    plan = f"A difference of {difference:g} nats with a pilot's paired spread of {sd:g} takes {needed} seeds"
    if results.exploratory and len(results.seeds) < needed:
        return (f"Exploratory: {plan[0].lower()}{plan[1:]}, this study has {len(results.seeds)}.",)
    return (f"{'Exploratory. ' if results.exploratory else ''}{plan} (power 0.8, 5 % level).",)

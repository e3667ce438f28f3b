"""Tables beside a study's main one: comparisons with controls and at other budgets, tuned rates, effects of factors."""

from collections.abc import Mapping, Sequence

from deepdelta.lab.analysis.contrasts import contrasts
from deepdelta.lab.analysis.factorial import effects
from deepdelta.lab.analysis.results import BudgetName, ConditionResult, StudyResults, Tuned
from deepdelta.lab.analysis.scaling import Estimate, Scaling
from deepdelta.lab.experiments.search import SearchResults
from deepdelta.lab.statistics import MINIMUM_SEEDS, Comparison, verdict
from deepdelta.lab.views.table import interval_text, notes_of_design
from deepdelta.lab.views.tables import ABSENT, Cells, Column

COMPARISON = (
    Column(title="change", help="Mean over seeds in nats per token; negative means a lower loss."),
    Column(title="95 %\ninterval", help="Of the change: Student's t on the seeds."),
    Column(
        title="p\n(Holm)", help="Two-sided t-test, corrected for all rows of this table at the same budget.", spare=6
    ),
    Column(title="finding", help="What the interval and the corrected test show.", spare=9),
)


def detail_tables(results: StudyResults) -> tuple[Cells, ...]:
    """Those of the tables that this study has something to put in."""
    tuned = {one.name: one.tuned for one in results.conditions if one.tuned is not None}
    tables = (_contrasts(results), _effects(results), tuning_table(tuned, notes_of_design(results)))
    return tuple(table for table in tables if table is not None and table.rows)


def _contrasts(results: StudyResults) -> Cells | None:
    if len(results.budgets) == 1 and not any(condition.control for condition in results.conditions):
        return None
    columns = (
        Column(title="condition", help="What was trained."),
        Column(
            title="compared with",
            help="The baseline, or the control that differs from the condition in one part.",
        ),
        Column(title="at equal", help="What both spend: training tokens, floating-point operations or seconds."),
        Column(title="steps", help="Of the condition; and of what it is compared with.", spare=8),
        *COMPARISON,
    )
    rows = tuple(
        (
            one.condition,
            one.reference,
            one.budget,
            f"{_steps(results, results.condition(one.condition), one.budget)}\n"
            f"({_steps(results, results.condition(one.reference), one.budget)})",
            *_comparison(one.comparison),
        )
        for one in contrasts(results)
    )
    notes = ("Equal time goes by the speed of single steps, measured in turns before the study.",)
    return Cells(
        title="Comparisons with the baseline and with controls",
        columns=columns,
        rows=rows,
        notes=(*(notes if "time" in results.budgets else ()), *notes_of_design(results)),
    )


def _effects(results: StudyResults) -> Cells | None:
    if not results.factorials:
        return None
    columns = (
        Column(title="effect", help="A change of level, or how one change depends on another (their interaction)."),
        Column(title="factorial", help="The set of conditions that it is computed on."),
        Column(title="at equal", help="What all conditions spend."),
        *COMPARISON,
    )
    rows = tuple((one.name, one.factorial, one.budget, *_comparison(one.comparison)) for one in effects(results))
    notes = (
        "A main effect is a difference of mean losses over the levels of the other factors; an interaction is the "
        "difference of two such differences.",
        *notes_of_design(results),
    )
    return Cells(title="Effects of factors", columns=columns, rows=rows, notes=notes)


def tuning_table(tuned: Mapping[str, Tuned], notes_of_study: Sequence[str] = ()) -> Cells | None:
    """The learning rate of every condition and what it was chosen from; None where nothing was tuned."""
    if not tuned:
        return None
    first = next(iter(tuned.values()))
    columns = (
        Column(title="condition", help="What was tuned."),
        Column(title="chosen", help="The learning rate of its reported runs."),
        *(Column(title=f"lr {rate:g}", help=f"Mean loss at the rate {rate:g}.") for rate in first.grid),
    )
    rows = tuple(
        (name, rate_text(tune.lr, tune.edge), *("diverged" if x is None else f"{x:.4f}" for x in tune.losses))
        for name, tune in tuned.items()
    )
    notes = (
        f"Losses on the last tenth of the training part, seeds {', '.join(map(str, first.seeds))}, which no "
        "result rests on.",
        *(
            ("A rate at the edge of its grid is marked: a better one may lie beyond.",)
            if any(tune.edge for tune in tuned.values())
            else ()
        ),
        *notes_of_study,
    )
    return Cells(title="Choice of the learning rate", columns=columns, rows=rows, notes=notes)


def _estimate(one: Estimate | None, sign: str = "") -> str:
    if one is None:
        return ABSENT
    reach = one.interval
    return f"{one.mean:{sign}.4f}" + (f"\n({reach.low:{sign}.4f} to {reach.high:{sign}.4f})" if reach else "")


def scaling_table(found: Scaling) -> Cells:
    """The laws of a study over sizes, and the loss and the gap that they foretell."""
    columns = (
        Column(title="condition", help="What was trained at every size."),
        Column(title="loss by size", help="Mean over seeds in nats per token, and FLOPs of a run."),
        Column(title="law", help="Loss as a function of training FLOPs C."),
        Column(title="exponent", help="Mean over laws of single seeds, with its 95 % t-interval."),
        Column(title=f"loss at\n{found.target:.3g} FLOPs", help="Foretold by them, with its 95 % t-interval."),
        Column(title="gap", help="To the baseline at that compute, with its 95 % t-interval; negative: lower loss."),
        Column(title="gap by the two\nlargest sizes", help="The same where laws go through these alone."),
    )
    rows = tuple(
        (
            one.condition,
            "\n".join(f"{loss:.4f} ({flops:.3g})" for loss, flops in zip(one.losses, one.flops, strict=True)),
            f"{f'{one.law.floor:.4f} + ' if one.law.floor else ''}{one.law.scale:.4f} "
            f"(C / {one.law.unit:.3g})^-{one.law.exponent:.4f}",
            _estimate(one.exponent),
            _estimate(one.at),
            _estimate(one.gap, "+"),
            _estimate(one.gap_of_largest, "+"),
        )
        for one in found.fits
    )
    notes = (
        f"Fitted over the sizes {', '.join(found.sizes)}. Intervals hold the noise of seeds alone, not the doubt "
        "whether the law goes on beyond the largest size.",
    )
    return Cells(title=f"{found.name}: loss against compute", columns=columns, rows=rows, notes=notes)


def search_table(found: SearchResults) -> Cells:
    """Every rung of a search, best candidate first."""
    columns = (
        Column(title="candidate", help="Marked where it went on to the next rung, or won the last."),
        Column(title="rung", help="And its number of steps."),
        Column(title="loss", help="Mean over the rung's seeds on the last tenth of the training part."),
        Column(title="change", help="From the baseline on the same seeds; negative means a lower loss."),
        Column(title="95 %\ninterval", help="Of the change: Student's t on the paired seeds."),
        Column(title="p\n(Holm)", help="Two-sided paired t-test, corrected for the candidates of the rung."),
    )
    rows = []
    for number, rung in enumerate(found.rungs, 1):
        for one in rung.ranking:
            change = one.change
            rows.append(
                (
                    f"{one.condition} (kept)" if one.kept else one.condition,
                    f"{number}\n({rung.steps:,})",
                    "diverged" if one.mean is None else f"{one.mean:.4f}",
                    ABSENT if change is None else f"{change.mean:+.4f}",
                    interval_text(change.t_interval if change else None),
                    ABSENT if change is None or change.adjusted_p is None else f"{change.adjusted_p:.2g}",
                )
            )
    notes = (
        "The best of many candidates looks better than it is: only fresh seeds and held-out text confirm it. "
        f"Intervals are given from {MINIMUM_SEEDS} seeds on.",
    )
    return Cells(title=f"{found.name}: successive halving", columns=columns, rows=tuple(rows), notes=notes)


def rate_text(lr: float, edge: bool) -> str:
    return f"{lr:g} (edge)" if edge else f"{lr:g}"


def _comparison(comparison: Comparison) -> tuple[str, ...]:
    p = comparison.adjusted_p
    return (
        f"{comparison.mean:+.4f}",
        interval_text(comparison.t_interval),
        ABSENT if p is None else f"{p:.2g}",
        verdict(comparison),
    )


def _steps(results: StudyResults, condition: ConditionResult, budget: BudgetName) -> str:
    steps = {run.steps or results.budget.steps for run in condition.at(budget)}
    return ", ".join(f"{number:,}" for number in sorted(steps))

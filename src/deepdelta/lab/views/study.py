"""The tables of studies: a row per condition; comparisons, effects and tuned rates; searches and sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from rich.table import Table

from deepdelta.lab.analysis.comparison import MINIMUM_SEEDS, Estimate
from deepdelta.lab.analysis.results import BudgetName, ConditionResult, Contrast, StudyResults, Tuned
from deepdelta.lab.analysis.scaling import EffectiveSpeed, Scaling, ScalingResult, Trend
from deepdelta.lab.experiments.search import Ranked, RungResult, SearchResults
from deepdelta.lab.views.tables import (
    ABSENT,
    Column,
    TextTable,
    comparison_columns,
    markdown_page,
    render,
    si,
    table_of,
)


def main_table(results: StudyResults) -> TextTable:
    """All that the table says. Columns of intervals exist only if some comparison has enough seeds for them."""
    comparisons = {one.condition: one.comparison for one in results.against_baseline()}
    intervals = any(one.t_interval is not None for one in comparisons.values())
    costs = any(one.cost for one in results.conditions)
    flops = results.condition(results.baseline).flops_per_token
    change, interval, p, _ = comparison_columns(lambda one: comparisons.get(one.name))

    def change_text(one: ConditionResult) -> str:
        found = comparisons.get(one.name)
        few = found is not None and found.n != len(results.seeds)
        return change.say(one) + (f"\n({found.n} of {len(results.seeds)})" if found and few else "")

    def by_seed(one: ConditionResult) -> str:
        losses, ended = one.losses(), {run.seed for run in one.runs}
        texts = {seed: f"{loss:.4f}" for seed, loss in losses.items()}
        return "\n".join(texts.get(seed, "diverged" if seed in ended else ABSENT) for seed in results.seeds)

    def resolves(one: ConditionResult) -> str:
        found = comparisons.get(one.name)
        return f"{found.smallest_resolvable:.4f}" if found and found.smallest_resolvable else ABSENT

    def mean(one: ConditionResult) -> str:
        return f"{fmean(one.losses().values()):.4f}" if one.losses() else ABSENT

    def speed(one: ConditionResult) -> str:
        cost = one.cost
        return f"{cost.speed_ratio:.2f}x\n{cost.speed_ratio_low:.2f}-{cost.speed_ratio_high:.2f}" if cost else ABSENT

    def memory(one: ConditionResult) -> str:
        return f"{one.cost.peak_ratio:.2f}x" if one.cost else ABSENT

    seeds = ", ".join(map(str, results.seeds))
    columns = [
        Column(
            "condition",
            "What was trained; see the list of conditions.",
            lambda one: one.name + ("\n(baseline)" if one.name == results.baseline else ""),
        ),
        Column("loss", "Mean validation loss over finished seeds, nats per token. Lower is better.", mean),
        Column("by seed", f"Validation loss of seed {seeds}.", by_seed, spare=9),
        Column("change", f"Mean over seeds of condition minus {results.baseline}, same seed and data.", change_text),
        Column(
            "resolves",
            "Smallest true difference that this many seeds with this spread find in 4 of 5 studies (5 % level). "
            "The spread is itself estimated from these seeds.",
            resolves,
            spare=4,
        ),
        *([interval, replace(p, spare=0)] if intervals else []),
    ]
    if any(one.tuned for one in results.conditions):
        text = "The learning rate, tuned per condition; 'edge': of the grid."
        columns.append(Column("lr", text, lambda one: rate_text(one.tuned, "\n") if one.tuned else ABSENT, spare=1))
    columns += [
        Column("params", "Trained parameters.", lambda one: si(one.parameters), spare=6),
        Column(
            "FLOPs",
            "Per token of training, forward and backward; and relative to the baseline.",
            lambda one: f"{si(one.flops_per_token)}\n({one.flops_per_token / flops:.2f}x)",
            spare=5,
        ),
    ]
    if costs:
        rounds = "Tokens/s relative to the baseline: median and extremes of interleaved rounds."
        peak = "Peak of allocated tensors in a training step relative to the baseline."
        columns += [Column("speed", rounds, speed, spare=2), Column("memory", peak, memory, spare=3)]
    table = table_of(results.conditions, columns, notes=_notes(results, intervals, costs))
    return replace(table, rows=(*table.rows, *_ngram_row(results, columns)))


def _ngram_row(results: StudyResults, columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """What counted n-grams have, under the networks."""
    if (found := results.ngram) is None:
        return []
    losses = {seed: f"{loss:.4f}" for seed, loss in found.losses.items()}
    cells = {
        "condition": f"{found.order}-gram\n(counted)",
        "loss": f"{fmean(found.losses.values()):.4f}",
        "by seed": "\n".join(losses.get(seed, ABSENT) for seed in results.seeds),
    }
    return [tuple(cells.get(column.title, ABSENT) for column in columns)]


def render_study(results: StudyResults, width: int | None = None) -> Table:
    """The main table for a terminal of so many columns; None: this one."""
    bold = [number for number, condition in enumerate(results.conditions) if condition.name == results.baseline]
    return render(replace(main_table(results), title=results.name), bold, width)


def detail_tables(results: StudyResults) -> tuple[TextTable, ...]:
    """Those of the tables beside the main one that this study has something to put in."""
    tuned = {one.name: one.tuned for one in results.conditions if one.tuned is not None}
    tables = (_contrasts(results), _effects(results), tuning_table(tuned, _notes_of_design(results)))
    return tuple(table for table in tables if table is not None and table.rows)


def study_markdown(results: StudyResults) -> str:
    """All tables of a study as a page, with what their figures depend on."""
    validated = f"validated on {results.validation.tokens:,} tokens, {results.validation.contexts}"
    text = f"{results.corpus.description} (SHA-256 {results.corpus.sha256[:12]}); {validated}"
    facts = (results.facts(results.finished), f"Seeds {', '.join(map(str, results.seeds))}. {text}.")
    return markdown_page(
        f"{results.name}: {results.description}", facts, (main_table(results), *detail_tables(results))
    )


def search_markdown(found: SearchResults) -> str:
    """The rungs of a search as a page, and the learning rates that its candidates were given."""
    seeds = "; ".join(f"{rung.steps} steps on seeds {', '.join(map(str, rung.seeds))}" for rung in found.rungs)
    text = f"Rungs: {seeds}. {found.corpus.description} (SHA-256 {found.corpus.sha256[:12]})."
    tables = (search_table(found), tuning_table(found.tuned))
    facts = (found.facts(found.finished), text)
    return markdown_page(f"Search {found.name}", facts, [table for table in tables if table is not None])


def scaling_markdown(found: Scaling, studies: Mapping[str, StudyResults]) -> str:
    """The laws as a page, then the tables of the study at every size."""
    pages = [
        study_markdown(results).replace("\n### ", "\n#### ").replace("# ", "## ", 1) for results in studies.values()
    ]
    tables = (scaling_table(found), *([trend_table(found)] if found.trends else []))
    laws = markdown_page(f"Sizes {found.name}", (found.facts(found.finished),), tables)
    return "\n".join([laws, *pages])


def tuning_table(tuned: Mapping[str, Tuned], notes_of_study: Sequence[str] = ()) -> TextTable | None:
    """The learning rate of every condition and what it was chosen from; None where nothing was tuned."""
    if not tuned:
        return None
    first, grid = next(iter(tuned.values())), sorted({rate for tune in tuned.values() for rate in tune.grid})
    notes = [
        f"Losses on the last tenth of the training part, seeds {', '.join(map(str, first.seeds))}, which no "
        "result rests on."
    ]
    if any(tune.edge for tune in tuned.values()):
        notes.append("A rate at the edge of its grid is marked: a better one may lie beyond.")
    columns = (
        Column("condition", "What was tuned."),
        Column("chosen", "The learning rate of its reported runs."),
        *(Column(f"lr {rate:g}", f"Mean loss at the rate {rate:g}.") for rate in grid),
    )

    def loss(tune: Tuned, rate: float) -> str:
        if rate not in tune.grid:
            return ABSENT
        found = tune.losses[tune.grid.index(rate)]
        return "diverged" if found is None else f"{found:.4f}"

    rows = tuple((name, rate_text(tune), *(loss(tune, rate) for rate in grid)) for name, tune in tuned.items())
    return TextTable(title="Choice of the learning rate", columns=columns, rows=rows, notes=(*notes, *notes_of_study))


def trend_table(found: Scaling) -> TextTable:
    """How the differences of a study change from size to size."""
    columns = [
        Column("condition", "What is compared.", lambda one: one.condition),
        Column("to", "With what: the baseline, or its control.", lambda one: one.reference, words=True),
        *(
            Column(size, "Difference there, mean over seeds, in nats; negative: lower loss.", partial(_at_size, place))
            for place, size in enumerate(found.sizes)
        ),
        Column("effective speed", SPEED, _speeds),
        Column(
            "slope", "In nats per factor e of compute, with its 95 % t-interval.", lambda one: _estimate(one.slope, "+")
        ),
    ]
    note = "Slopes are lines of least squares over ln C for every seed, C the baseline's training FLOPs."
    return table_of(found.trends, columns, title="Differences by size", notes=(note,))


SPEED = (
    "What the loss is worth, by size: the compute with which the baseline has it, over what it has there, times the "
    "speed ratio. A bound where the loss is beyond the baseline's."
)


def _speeds(one: Trend) -> str:
    def say(speed: EffectiveSpeed | None) -> str:
        return (
            ABSENT if speed is None else {None: "", "above": "> ", "below": "< "}[speed.bound] + f"{speed.ratio:.2f}x"
        )

    return "\n".join(map(say, one.effective_speed)) if any(one.effective_speed) else ABSENT


def _at_size(place: int, one: Trend) -> str:
    return f"{one.differences[place]:+.4f}"


def scaling_table(found: Scaling) -> TextTable:
    """The laws of a study over sizes, and the loss and the gap that they foretell."""

    def points(one: ScalingResult) -> str:
        return "\n".join(f"{loss:.4f} ({flops:.3g})" for loss, flops in zip(one.losses, one.flops, strict=True))

    def law(one: ScalingResult) -> str:
        floor = f"{one.law.floor:.4f} + " if one.law.floor else ""
        return f"{floor}{one.law.scale:.4f} (C / {one.law.unit:.3g})^-{one.law.exponent:.4f}"

    at, foretold = f"loss at\n{found.target:.3g} FLOPs", "Foretold by them, with its 95 % t-interval."
    gap = "To the baseline at that compute, with its 95 % t-interval; negative: lower loss."
    alone = "The same where laws go through these alone."
    columns = [
        Column("condition", "What was trained at every size.", lambda one: one.condition),
        Column("loss by size", "Mean over seeds in nats per token, and FLOPs of a run.", points),
        Column("law", "Loss as a function of training FLOPs C.", law),
        Column("exponent", "Mean over laws of single seeds, with its t-interval.", lambda one: _estimate(one.exponent)),
        Column(at, foretold, lambda one: _estimate(one.at)),
        Column("gap", gap, lambda one: _estimate(one.gap, "+")),
        Column("gap by the two\nlargest sizes", alone, lambda one: _estimate(one.gap_of_largest, "+")),
    ]
    note = (
        f"Fitted over the sizes {', '.join(found.sizes)}. Intervals hold the noise of seeds alone, not the doubt "
        "whether the law goes on beyond the largest size."
    )
    return table_of(found.fits, columns, title=f"{found.name}: loss against compute", notes=(note,))


def search_table(found: SearchResults) -> TextTable:
    """Every rung of a search, best candidate first."""

    def loss(row: tuple[int, RungResult, Ranked]) -> str:
        return "diverged" if row[2].mean is None else f"{row[2].mean:.4f}"

    columns = [
        Column(
            "candidate",
            "Marked where it went on to the next rung, or won the last.",
            lambda row: f"{row[2].condition} (kept)" if row[2].kept else row[2].condition,
        ),
        Column("rung", "And its number of steps.", lambda row: f"{row[0]}\n({row[1].steps:,})"),
        Column("loss", "Mean over the rung's seeds on the last tenth of the training part.", loss),
        *comparison_columns(lambda row: row[2].change)[:3],
    ]
    rows = [(number, rung, one) for number, rung in enumerate(found.rungs, 1) for one in rung.ranking]
    note = (
        "The best of many candidates looks better than it is: only fresh seeds and held-out text confirm it. "
        f"Intervals are given from {MINIMUM_SEEDS} seeds on."
    )
    return table_of(rows, columns, title=f"{found.name}: successive halving", notes=(note,))


def rate_text(tuned: Tuned, between: str = " ") -> str:
    return f"{tuned.lr:g}{between}(edge)" if tuned.edge else f"{tuned.lr:g}"


def _contrasts(results: StudyResults) -> TextTable | None:
    if len(results.budgets) == 1 and not any(condition.control for condition in results.conditions):
        return None

    def steps(one: Contrast) -> str:
        return f"{_steps(results, one.condition, one.budget)}\n({_steps(results, one.reference, one.budget)})"

    reference = "The baseline, or the control that differs from the condition in one part."
    spent = "What both spend: training tokens, floating-point operations or seconds."
    columns = [
        Column("condition", "What was trained.", lambda one: one.condition),
        Column("compared with", reference, lambda one: one.reference),
        Column("at equal", spent, lambda one: one.budget),
        Column("steps", "Of the condition; and of what it is compared with.", steps, spare=8),
        *comparison_columns(lambda one: one.comparison),
    ]
    note = "Equal time goes by the speed of single steps, measured in turns before the study."
    notes = (*((note,) if "time" in results.budgets else ()), *_notes_of_design(results))
    return table_of(results.contrasts, columns, title="Comparisons with the baseline and with controls", notes=notes)


def _effects(results: StudyResults) -> TextTable | None:
    if not results.factorials:
        return None
    meaning = "A change of level, or how one change depends on another (their interaction)."
    columns = [
        Column("effect", meaning, lambda one: one.name),
        Column("factorial", "The set of conditions that it is computed on.", lambda one: one.factorial),
        Column("at equal", "What all conditions spend.", lambda one: one.budget),
        *comparison_columns(lambda one: one.comparison),
    ]
    notes = (
        "A main effect is a difference of mean losses over the levels of the other factors; an interaction is the "
        "difference of two such differences.",
        *_notes_of_design(results),
    )
    return table_of(results.effects, columns, title="Effects of factors", notes=notes)


def _estimate(one: Estimate | None, sign: str = "") -> str:
    if one is None:
        return ABSENT
    reach = one.interval
    return f"{one.mean:{sign}.4f}" + (f"\n({reach.low:{sign}.4f} to {reach.high:{sign}.4f})" if reach else "")


def _steps(results: StudyResults, condition: str, budget: BudgetName | None) -> str:
    assert budget is not None
    steps = {run.steps or results.budget.steps for run in results.condition(condition).at(budget)}
    return ", ".join(f"{number:,}" for number in sorted(steps))


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
    if results.ngram is not None:
        notes.append(
            f"The {results.ngram.order}-grams (Witten-Bell) are counted on each seed's own training batches and asked "
            "on the same windows."
        )
    if (steps := results.budget.start_steps) is not None:
        notes.append(f"All runs of a seed go on from the weights of one run of {steps:,} steps, not counted.")
    return (*notes, *_notes_of_design(results))


def _notes_of_design(results: StudyResults) -> tuple[str, ...]:
    """What every table of the study says about its plan: primary contrast, stop rule, number of seeds."""
    return (*_notes_of_primary(results), *_notes_of_seeds(results))


def _notes_of_primary(results: StudyResults) -> tuple[str, ...]:
    if (one := results.primary) is None:
        return ()
    compared = f"{one.condition} against {one.reference or results.baseline}"
    return (f"Written before it ran: primary contrast {compared}; refuted if {one.refuted}; stop rule: {one.stop}.",)


def _notes_of_seeds(results: StudyResults) -> tuple[str, ...]:
    power, needed = results.power, results.seeds_needed
    if power is None or needed is None:
        return ("Exploratory.",) if results.exploratory else ()
    plan = (
        f"A difference of {power.difference:g} nats with a pilot's paired spread of {power.pilot_sd:g} takes "
        f"{needed} seeds"
    )
    if results.exploratory and len(results.seeds) < needed:
        return (f"Exploratory: {plan[0].lower()}{plan[1:]}, this study has {len(results.seeds)}.",)
    return (f"{'Exploratory. ' if results.exploratory else ''}{plan} (power 0.8, 5 % level).",)

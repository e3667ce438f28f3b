"""What a study would run and what that takes, before any of it is run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deepdelta.config import from_plain
from deepdelta.lab.experiments.config import Comparison, Search, Sizes, StudyConfig
from deepdelta.lab.experiments.plan import Plan, plan_of
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.training_run import TrainingRun, starts
from deepdelta.lab.views.tables import Column, TextTable, table_of
from deepdelta.models import parameter_count
from deepdelta.planning import Gpu, outlook


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What the runs of a condition take."""

    condition: str
    """With its size, in a study over sizes."""
    parameters: int
    runs: int
    recorded: int
    """Of these, those that are there already; what follows is of all."""
    tokens: int
    epochs: float
    """Of its longest run: how often it sees the training part."""
    flops: float
    hours: float | None
    """On one GPU, by the roofline of `deepdelta.planning`; None where none was named."""


def preview(study: StudyConfig, out: Path, gpu: Gpu | None) -> TextTable:
    """A row per condition, its runs that tune among them.

    Raises:
        UserError: what `runner.run` refuses before it begins, or a model that does not fit the GPU.
    """
    parts = {f"{size} ": size for size in study.sizes} if isinstance(study, Sizes) else {"": ""}
    rows = [
        row
        for prefix, size in parts.items()
        for row in _taken(study.sized(size) if isinstance(study, Sizes) else study, out / size, gpu, prefix)
    ]
    total = f"{sum(row.runs for row in rows)} runs, {sum(row.flops for row in rows):.3g} FLOPs"
    hours = sum(row.hours or 0.0 for row in rows)
    notes = [f"In all {total}" + ("." if gpu is None else f", {_hours(hours)} hours of one such GPU.")]
    if study.tune is not None:
        notes.append("A rate at an end of its grid adds runs, at most two per condition and seed of tuning.")
    if isinstance(study, Search):
        notes.append("Of a search: as many as go on from each rung, whichever they will be.")
    if isinstance(study, Comparison) and "time" in study.budgets:
        notes.append("Other conditions' runs at equal time come on top: their steps follow from what steps cost here.")
    if gpu is not None:
        notes.append(
            "Hours are of a roofline in bf16, compiled (docs/planning.md), without compiling, validating, launching."
        )
    columns = [column for column in COLUMNS if gpu is not None or column.title != "GPU hours"]
    return table_of(rows, columns, title=f"Study {study.name}: {study.question}", notes=notes)


def _hours(number: float) -> str:
    return "< 0.01" if number < 0.01 else f"{number:.2f}" if number < 10 else f"{number:,.0f}"


COLUMNS: Sequence[Column] = (
    Column("condition", say=lambda row: row.condition, words=True),
    Column("parameters", say=lambda row: f"{row.parameters:,}"),
    Column("runs", "tuning included", say=lambda row: str(row.runs)),
    Column("recorded", "of these, there already", say=lambda row: str(row.recorded)),
    Column("tokens", "of all its runs", say=lambda row: f"{row.tokens / 1e6:,.2f} M"),
    Column("epochs", "of its longest run", say=lambda row: f"{row.epochs:.2g}", spare=1),
    Column("FLOPs", "forward and backward, of all its runs", say=lambda row: f"{row.flops:.3g}"),
    Column("GPU hours", say=lambda row: _hours(row.hours)),
)


def _taken(study: StudyConfig, out: Path, gpu: Gpu | None, prefix: str) -> Iterator[Taken]:
    plan = plan_of(study, out)
    runs = list(_runs(plan))
    there = {name: from_plain(RunRecord, row, where=f"{out}: {name}") for name, row in plan.records.rows().items()}
    for condition in study.conditions:
        own = [run for run in runs if run.condition == condition]
        train = study.train_config(condition, study.seeds[0])
        model = replace(train.model, vocab_size=train.model.vocab_size or plan.corpus.vocab_size)
        each = [run.settings.steps * run.settings.tokens_per_step for run in own]
        speed = None if gpu is None else outlook(replace(train, model=model), gpu, 1).tokens_per_second
        yield Taken(
            condition=prefix + condition,
            parameters=parameter_count(model),
            runs=len(own),
            recorded=sum(_recorded(run, there.get(run.name)) for run in own),
            tokens=sum(each),
            epochs=max(each, default=0) / len(plan.corpus.train),
            flops=float(sum(each) * plan.flops_per_token(condition)),
            hours=None if speed is None else sum(each) / speed / 3600,
        )


def _recorded(run: TrainingRun, record: RunRecord | None) -> bool:
    """Whether it is there.

    Raises:
        UserError: with other settings than its rate, which may have been tuned.
    """
    if record is None:
        return False
    return replace(run, settings=replace(run.settings, lr=record.settings["lr"])).stored() is not None


def _runs(plan: Plan) -> Iterable[TrainingRun]:
    """Each once, those that tune and those that others start from among them."""
    study = plan.study
    reported: Iterable[TrainingRun] = ()
    if isinstance(study, Search):
        reported = plan.rungs(study, 0, study.candidates, {})
    elif isinstance(study, Comparison):
        # Steps at equal time follow from costs, which are measured when a study runs; but for the baseline's own.
        counted = tuple(one for one in study.budgets if one != "time")
        planned = plan.runs(replace(study, budgets=counted or ("tokens",)), {})
        reported = [run for (name, *_), run in planned.items() if counted or name == study.baseline]
    runs = [*plan.tuning().values(), *reported]
    return {run.name: run for run in (*starts(runs), *runs)}.values()

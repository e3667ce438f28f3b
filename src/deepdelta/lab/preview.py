"""What a study would run and what that takes, before any of it is run."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from deepdelta.data import Corpus, DataConfig, load_corpus, train_tail
from deepdelta.lab.experiments.config import Comparison, Search, Sizes, StudyConfig
from deepdelta.lab.experiments.plan import Plan
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.experiments.training_run import TrainingRun, starts
from deepdelta.lab.views.tables import Column, TextTable, table_of
from deepdelta.models import parameter_count
from deepdelta.planning import Gpu, outlook
from deepdelta.progress import show


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
    flops: float
    hours: float | None
    """On one GPU, by the roofline of `deepdelta.planning`; None where none was named."""


def preview(study: StudyConfig, out: Path, gpu: Gpu | None) -> TextTable:
    """A row per condition, its runs that tune among them.

    Raises:
        UserError: a text that cannot be read, or a model that does not fit the GPU.
    """
    text = cache(lambda data: load_corpus(replace(data, held_out="validation"), progress=show))
    parts = {f"{size} ": size for size in study.sizes} if isinstance(study, Sizes) else {"": ""}
    rows = [
        row
        for prefix, size in parts.items()
        for row in _taken(study.sized(size) if isinstance(study, Sizes) else study, text, out / size, gpu, prefix)
    ]
    total = f"{sum(row.runs for row in rows)} runs, {sum(row.flops for row in rows):.3g} FLOPs"
    hours = sum(row.hours or 0.0 for row in rows)
    notes = [f"In all {total}" + ("." if gpu is None else f", {hours:.2g} hours of one such GPU.")]
    if study.tune is not None:
        notes.append("A rate at an end of its grid adds runs, at most two per condition and seed of tuning.")
    if isinstance(study, Search):
        notes.append("Of a search: as many as go on from each rung, whichever they will be.")
    if isinstance(study, Comparison) and "time" in study.budgets:
        notes.append("Runs at equal time come on top; how long they are follows from what steps cost here.")
    if gpu is not None:
        notes.append(
            "Hours are of a roofline (docs/planning.md): nothing is compiled or validated, and no launch waits."
        )
    columns = [column for column in COLUMNS if gpu is not None or column.title != "GPU hours"]
    return table_of(rows, columns, title=f"Study {study.name}: {study.question}", notes=notes)


COLUMNS: Sequence[Column] = (
    Column("condition", say=lambda row: row.condition, words=True),
    Column("parameters", say=lambda row: f"{row.parameters:,}"),
    Column("runs", "tuning included", say=lambda row: str(row.runs)),
    Column("recorded", "of these, there already", say=lambda row: str(row.recorded)),
    Column("tokens", "of all its runs", say=lambda row: f"{row.tokens / 1e6:,.1f} M"),
    Column("FLOPs", "forward and backward, of all its runs", say=lambda row: f"{row.flops:.3g}"),
    Column("GPU hours", say=lambda row: f"{row.hours:.2g}"),
)


def _taken(
    study: StudyConfig, text: Callable[[DataConfig], Corpus], out: Path, gpu: Gpu | None, prefix: str
) -> Iterator[Taken]:
    corpus = text(study.train_config(study.baseline, study.seeds[0]).data)
    if isinstance(study, Comparison):
        # The steps at equal time follow from costs, which are measured when a study runs.
        study = replace(study, budgets=tuple(one for one in study.budgets if one != "time") or ("tokens",))
    plan = Plan(study, corpus, train_tail(corpus), RecordFile(out))
    runs = list(_runs(plan))
    # By name: rates that were tuned are not those of the study's file.
    there = plan.records.rows()
    recorded = Counter(run.condition for run in runs if run.name in there)
    for condition in study.conditions:
        own = [run for run in runs if run.condition == condition]
        train = study.train_config(condition, study.seeds[0])
        model = replace(train.model, vocab_size=train.model.vocab_size or corpus.vocab_size)
        tokens = sum(run.settings.steps * run.settings.tokens_per_step for run in own)
        speed = None if gpu is None else outlook(replace(train, model=model), gpu, 1).tokens_per_second
        yield Taken(
            condition=prefix + condition,
            parameters=parameter_count(model),
            runs=len(own),
            recorded=recorded[condition],
            tokens=tokens,
            flops=float(tokens * plan.flops_per_token(condition)),
            hours=None if speed is None else tokens / speed / 3600,
        )


def _runs(plan: Plan) -> Iterable[TrainingRun]:
    """Each once, those that tune and those that others start from among them."""
    study = plan.study
    reported: Iterable[TrainingRun] = ()
    if isinstance(study, Search):
        reported = plan.rungs(study, 0, study.candidates, {})
    elif isinstance(study, Comparison):
        reported = plan.runs(study, {}).values()
    runs = [*plan.tuning().values(), *reported]
    return {run.name: run for run in (*starts(runs), *runs)}.values()

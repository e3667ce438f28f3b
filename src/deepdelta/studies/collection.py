"""From finished run directories to the results of a study."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from deepdelta.analysis.cost import measure_costs
from deepdelta.analysis.flops import training_flops_per_token
from deepdelta.analysis.rewrites import RewriteTotals, rewrite_totals
from deepdelta.config import from_plain, to_plain
from deepdelta.data import Corpus, windows
from deepdelta.errors import UserError
from deepdelta.files import write_json
from deepdelta.studies.config import StudyConfig
from deepdelta.studies.results import (
    Budget,
    ConditionResult,
    CostResult,
    CurvePoint,
    RewriteSummary,
    RunResult,
    StudyResults,
    Validation,
)
from deepdelta.studies.results import Corpus as CorpusResult
from deepdelta.training import RunDirectory, load
from deepdelta.training.environment import commit, machine, versions
from deepdelta.training.evaluation import CONTEXTS
from deepdelta.training.progress import reporting

Cells = Mapping[tuple[str, int], Path]
"""Run directories by condition and seed."""


def measure(config: StudyConfig, vocab_size: int, file: Path) -> dict[str, CostResult]:
    """The costs of every condition, measured in a phase of their own, or as `file` has them from an earlier call."""
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        old = known["costs"]
        if known["baseline"] == config.baseline and set(old) >= set(config.conditions):
            return {name: from_plain(CostResult, old[name]) for name in config.conditions}
    plans = {name: config.train_config(name, config.seeds[0]) for name in config.conditions}
    settings = {name: replace(plan, threads=plan.threads or 1) for name, plan in plans.items()}
    with reporting("Costs", config.cost_rounds) as reporter:
        measured = measure_costs(
            settings,
            vocab_size=vocab_size,
            rounds=config.cost_rounds,
            baseline=config.baseline,
            progress=lambda done, total: reporter.update(done, "rounds of training steps, all conditions in turn"),
        )
    costs = {name: CostResult(**asdict(cost)) for name, cost in measured.items()}
    write_json(file, {"baseline": config.baseline, "costs": {name: to_plain(cost) for name, cost in costs.items()}})
    return costs


def collect(
    config: StudyConfig,
    cells: Cells,
    costs: Mapping[str, CostResult],
    corpus: Corpus,
    *,
    command: str,
    started: datetime.datetime,
) -> StudyResults:
    """Read every run's metrics, run the trained models over validation text with a recorder, and count FLOPs.

    Raises:
        UserError: the runs were trained on different corpora, which do not compare.
    """
    corpora = {RunDirectory(path).environment()["corpus_sha256"] for path in cells.values()}
    if corpora != {corpus.sha256}:
        raise UserError(
            "the runs of this study were trained on different corpora, which do not compare "
            f"(SHA-256 {', '.join(sorted(sha[:12] for sha in corpora | {corpus.sha256}))}); give another --out."
        )
    settings = config.train_config(config.baseline, config.seeds[0])
    return StudyResults(
        name=config.name,
        description=config.question,
        baseline=config.baseline,
        command=command,
        commit=commit(),
        versions=versions(),
        machine=machine(),
        started=started.isoformat(timespec="seconds"),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        corpus=CorpusResult(description=corpus.description, sha256=corpus.sha256),
        validation=Validation(
            tokens=min(settings.final_eval_tokens or len(corpus.validation), len(corpus.validation) - 1),
            contexts=CONTEXTS.format(settings.model.context),
        ),
        budget=Budget(
            steps=settings.steps, tokens_per_step=settings.tokens_per_step, threads_per_run=settings.threads or 1
        ),
        seeds=config.seeds,
        conditions=tuple(_condition(config, name, cells, corpus, costs.get(name)) for name in config.conditions),
    )


def _condition(
    config: StudyConfig, name: str, cells: Cells, corpus: Corpus, cost: CostResult | None
) -> ConditionResult:
    settings = config.train_config(name, config.seeds[0])
    model_config = replace(settings.model, vocab_size=settings.model.vocab_size or corpus.vocab_size)
    totals: dict[str, RewriteTotals] = {}
    parameters = 0
    runs = tuple(_run(seed, cells[name, seed]) for seed in config.seeds)
    # Whole windows only: what fills up a last one is no text.
    context = settings.model.context
    span = max(1, min(config.rewrite_tokens, len(corpus.validation) - 1) // context) * context
    text = corpus.validation[: span + 1]
    for run in runs:
        model = load(cells[name, run.seed]).model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if run.validation_loss is None:
            continue
        batches = windows(text, context=context, batch_size=settings.batch_size)
        rewrite_totals(model, (inputs for inputs, _ in batches), into=totals)
    return ConditionResult(
        name=name,
        summary=config.conditions[name].summary,
        rule=model_config.residual.rule,
        value_channels=model_config.residual.value_channels,
        parameters=parameters,
        flops_per_token=training_flops_per_token(model_config).training,
        cost=cost,
        runs=runs,
        rewrites=tuple(_rewrite(residual, total) for residual, total in totals.items()),
    )


def _run(seed: int, path: Path) -> RunResult:
    rows = list(RunDirectory(path).metrics())
    final = [row for row in rows if row.get("final")]
    every = max(1, len(rows) // 200)
    curve = [
        CurvePoint(
            step=row["step"],
            seconds=row["seconds"],
            train_loss=row.get("loss"),
            validation_loss=row.get("validation_loss"),
        )
        for row in rows
        if "validation_loss" in row or ("loss" in row and row["step"] % every == 0)
    ]
    return RunResult(
        seed=seed,
        validation_loss=final[-1]["validation_loss"] if final else None,
        seconds=max(row.get("seconds", 0.0) for row in rows),
        curve=tuple(curve),
    )


def _rewrite(residual: str, total: RewriteTotals) -> RewriteSummary:
    """The totals of the residual named 'layers.<number>.<sublayer>'."""
    _, layer, sublayer = residual.split(".")
    before, after = total.mean("before"), total.mean("after")
    gated = "gate" in total.sums
    return RewriteSummary(
        layer=int(layer),
        sublayer=sublayer,
        gate_histogram=tuple(int(count) for count in total.gates) if gated else None,
        gate_mean=total.mean("gate"),
        discrepancy_before=None if before is None else before**0.5,
        discrepancy_after=None if after is None else after**0.5,
        direction_norm=total.mean("norm"),
        cosine=total.mean("cosine"),
    )

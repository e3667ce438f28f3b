"""From cells to the results of a study, and what its conditions cost."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from deepdelta.analysis.cost import measure_costs
from deepdelta.analysis.flops import training_flops_per_token
from deepdelta.config import from_plain, to_plain
from deepdelta.data import Corpus
from deepdelta.files import write_json
from deepdelta.models import parameter_count
from deepdelta.studies.cells import Cell, merged_rewrites
from deepdelta.studies.config import StudyConfig
from deepdelta.studies.results import (
    Budget,
    BudgetName,
    ConditionResult,
    CostResult,
    RunResult,
    StudyResults,
    Tuned,
    Validation,
)
from deepdelta.studies.results import Corpus as CorpusResult
from deepdelta.training.environment import provenance
from deepdelta.training.evaluation import CONTEXTS
from deepdelta.training.progress import reporting

Cells = Mapping[tuple[str, int, BudgetName], Cell]
"""Cells by condition, seed and budget."""

CURVE_POINTS, FEWEST_POINTS = 4000, 12
"""Points of all curves together besides validations, and of each at least: what keeps results.json small."""


def measure(config: StudyConfig, vocab_size: int, file: Path) -> dict[str, CostResult]:
    """The costs of every condition, each measured once in turns with the baseline and then kept in `file`.

    Budgets of equal time rest on these numbers, so what was measured stays as it was when conditions are added.
    """
    known: dict[str, CostResult] = {}
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if there["baseline"] == config.baseline:
            known = {name: from_plain(CostResult, cost) for name, cost in there["costs"].items()}
    if missing := [name for name in config.conditions if name not in known]:
        plans = {
            name: config.train_config(name, config.seeds[0]) for name in dict.fromkeys((config.baseline, *missing))
        }
        settings = {name: replace(plan, threads=plan.threads or 1) for name, plan in plans.items()}
        with reporting("Costs", config.cost_rounds) as reporter:
            measured = measure_costs(
                settings,
                vocab_size=vocab_size,
                rounds=config.cost_rounds,
                baseline=config.baseline,
                progress=lambda done, total: reporter.update(done, "rounds of training steps, all conditions in turn"),
            )
        known = {name: CostResult(**asdict(cost)) for name, cost in measured.items()} | known
        write_json(file, {"baseline": config.baseline, "costs": {name: to_plain(cost) for name, cost in known.items()}})
    return {name: known[name] for name in config.conditions}


def collect(
    config: StudyConfig,
    cells: Cells,
    costs: Mapping[str, CostResult],
    tuned: Mapping[str, Tuned],
    corpus: Corpus,
    *,
    command: str,
    started: datetime.datetime,
) -> StudyResults:
    """The results of a study: its cells put together, and what is computed from configurations alone."""
    settings = config.train_config(config.baseline, config.seeds[0])
    return StudyResults(
        name=config.name,
        description=config.question,
        baseline=config.baseline,
        **provenance(command),
        started=started.isoformat(timespec="seconds"),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        corpus=CorpusResult(description=corpus.description, sha256=corpus.sha256),
        validation=Validation(
            tokens=min(settings.final_eval_tokens or len(corpus.validation), len(corpus.validation) - 1),
            contexts=CONTEXTS.format(settings.model.context),
        ),
        budget=Budget(
            steps=settings.steps,
            tokens_per_step=settings.tokens_per_step,
            threads_per_run=settings.threads or 1,
            start_steps=None if config.start is None else config.start_config(config.seeds[0]).steps,
        ),
        seeds=config.seeds,
        conditions=tuple(
            _condition(config, name, cells, corpus, costs.get(name), tuned.get(name)) for name in config.conditions
        ),
        budgets=config.budgets,
        factorials=config.factorials,
        power=config.power,
        exploratory=config.exploratory,
    )


def _condition(
    config: StudyConfig, name: str, cells: Cells, corpus: Corpus, cost: CostResult | None, tuned: Tuned | None
) -> ConditionResult:
    settings = config.train_config(name, config.seeds[0])
    model = replace(settings.model, vocab_size=settings.model.vocab_size or corpus.vocab_size)
    first, *others = config.budgets
    own = [cells[name, seed, first] for seed in config.seeds]
    points = max(FEWEST_POINTS, CURVE_POINTS // max(1, len(cells)))
    shown = {cell.name for cell in own}
    return ConditionResult(
        name=name,
        summary=config.conditions[name].summary,
        rule=model.residual.rule,
        value_channels=model.residual.value_channels,
        parameters=parameter_count(model),
        flops_per_token=float(training_flops_per_token(model).training),
        cost=cost,
        runs=tuple(_run(cell, points) for cell in own),
        rewrites=merged_rewrites(own),
        control=config.conditions[name].control,
        factors=config.conditions[name].factors,
        tuned=tuned,
        matched={
            budget: tuple(
                _run(cell, 0 if cell.name in shown else points)
                for cell in (cells[name, seed, budget] for seed in config.seeds)
            )
            for budget in others
        },
    )


def _run(cell: Cell, points: int) -> RunResult:
    """The cell as a result, with its validations and up to so many other points of its curve; none of either for 0."""
    steps = [point for point in cell.curve if point.validation_loss is None]
    kept = {round(i * (len(steps) - 1) / (points - 1)) for i in range(points)} if points > 1 and steps else set()
    chosen = {id(steps[index]) for index in kept}
    return RunResult(
        seed=cell.seed,
        validation_loss=cell.validation_loss,
        seconds=cell.seconds,
        steps=cell.settings["steps"],
        curve=tuple(p for p in cell.curve if points and (p.validation_loss is not None or id(p) in chosen)),
    )

"""From records to the results of a study, and what its conditions cost."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deepdelta.config import from_plain, to_plain
from deepdelta.data import Corpus
from deepdelta.files import read_object, write_json
from deepdelta.lab.analysis.comparisons import analyse
from deepdelta.lab.analysis.results import (
    Budget,
    BudgetName,
    ConditionResult,
    Measurements,
    RunResult,
    StudyResults,
    Tuned,
    Validation,
)
from deepdelta.lab.analysis.results import Corpus as CorpusResult
from deepdelta.lab.experiments.config import Comparison, StudyConfig
from deepdelta.lab.experiments.record import RunRecord, merged_rewrites
from deepdelta.lab.measure.cost import Cost, measure_costs
from deepdelta.lab.measure.flops import training_flops_per_token
from deepdelta.models import parameter_count
from deepdelta.progress import reporting
from deepdelta.provenance import now, provenance
from deepdelta.training import TrainConfig

Records = Mapping[tuple[str, int, BudgetName], RunRecord]
"""Records by condition, seed and budget."""

CURVE_POINTS, FEWEST_POINTS = 4000, 12
"""Points of all curves together besides validations, and of each at least: what keeps results.json small."""

COSTLY = ("model", "batch_size", "accumulate", "device", "precision", "backend", "memory", "compile", "threads")
"""Settings that decide what a training step costs."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What conditions cost, and a hash of what each was when that was measured."""

    baseline: str
    made_of: dict[str, str]
    costs: dict[str, Cost]


def measure(config: StudyConfig, vocab_size: int, file: Path) -> dict[str, Cost]:
    """The costs of every condition, each measured once in turns with the baseline and then kept in `file`.

    Budgets of equal time rest on these numbers, so what was measured stays as it was when conditions are added; it is
    measured anew where a condition is another one now, and all of it where the baseline is.
    """
    plans = {name: config.train_config(name, config.seeds[0]) for name in config.conditions}
    made_of = {name: _made_of(plan, vocab_size) for name, plan in plans.items()}
    known: dict[str, Cost] = {}
    if file.exists():
        there = from_plain(Costs, read_object(file, "delete it to measure costs again"), where=str(file))
        if there.baseline == config.baseline and there.made_of.get(there.baseline) == made_of[config.baseline]:
            made_of = there.made_of | made_of
            known = {name: cost for name, cost in there.costs.items() if there.made_of.get(name) == made_of.get(name)}
    if missing := [name for name in config.conditions if name not in known]:
        settings = {
            name: replace(plans[name], threads=plans[name].threads or 1)
            for name in dict.fromkeys((config.baseline, *missing))
        }
        with reporting("Costs", config.cost_rounds) as reporter:
            measured = measure_costs(
                settings,
                vocab_size=vocab_size,
                rounds=config.cost_rounds,
                baseline=config.baseline,
                progress=lambda done, total: reporter.update(done, "rounds of training steps, all conditions in turn"),
            )
        known = measured | known
        write_json(file, to_plain(Costs(baseline=config.baseline, made_of=made_of, costs=known)))
    return {name: known[name] for name in config.conditions}


def _made_of(plan: TrainConfig, vocab_size: int) -> str:
    """SHA-256 of what decides the cost of a training step."""
    plain = {key: value for key, value in to_plain(plan).items() if key in COSTLY}
    plain["model"]["vocab_size"] = plain["model"]["vocab_size"] or vocab_size
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def collect(
    config: Comparison,
    records: Records,
    costs: Mapping[str, Cost],
    tuned: Mapping[str, Tuned],
    corpus: Corpus,
    *,
    command: str,
    started: str,
) -> StudyResults:
    """The results of a study: its records put together and analysed, and what configurations alone decide."""
    settings = config.train_config(config.baseline, config.seeds[0])
    measured = Measurements(
        name=config.name,
        description=config.question,
        baseline=config.baseline,
        **provenance(command),
        started=started,
        finished=now(),
        corpus=CorpusResult(description=corpus.description, sha256=corpus.sha256),
        validation=Validation(
            tokens=max(record.validation_tokens for record in records.values()),
            contexts=next(iter(records.values())).contexts,
        ),
        budget=Budget(
            steps=settings.steps,
            tokens_per_step=settings.tokens_per_step,
            threads_per_run=settings.threads or 1,
            start_steps=None if config.start is None else config.start_config(config.seeds[0]).steps,
        ),
        seeds=config.seeds,
        conditions=tuple(
            _condition(config, name, records, corpus, costs.get(name), tuned.get(name)) for name in config.conditions
        ),
        budgets=config.budgets,
        factorials=config.factorials,
        power=config.power,
        exploratory=config.exploratory,
    )
    return analyse(measured)


def _condition(
    config: Comparison, name: str, records: Records, corpus: Corpus, cost: Cost | None, tuned: Tuned | None
) -> ConditionResult:
    settings = config.train_config(name, config.seeds[0])
    model = replace(settings.model, vocab_size=settings.model.vocab_size or corpus.vocab_size)
    first, *others = config.budgets
    own = [records[name, seed, first] for seed in config.seeds]
    points = max(FEWEST_POINTS, CURVE_POINTS // max(1, len(records)))
    shown = {record.name for record in own}
    return ConditionResult(
        name=name,
        summary=config.conditions[name].summary,
        rule=model.residual.rule,
        value_channels=model.residual.value_channels,
        parameters=parameter_count(model),
        flops_per_token=float(training_flops_per_token(model).training),
        cost=cost,
        runs=tuple(_run(record, points) for record in own),
        rewrites=merged_rewrites(own),
        control=config.conditions[name].control,
        factors=config.conditions[name].factors,
        tuned=tuned,
        matched={
            budget: tuple(
                _run(record, 0 if record.name in shown else points)
                for record in (records[name, seed, budget] for seed in config.seeds)
            )
            for budget in others
        },
    )


def _run(record: RunRecord, points: int) -> RunResult:
    """The record as a result, with its validations and up to so many other points of its curve; for 0 with no curve."""
    steps = [point for point in record.curve if point.validation_loss is None]
    kept = {round(i * (len(steps) - 1) / (points - 1)) for i in range(points)} if points > 1 and steps else set()
    chosen = {id(steps[index]) for index in kept}
    return RunResult(
        seed=record.seed,
        validation_loss=record.validation_loss,
        seconds=record.seconds,
        steps=record.settings["steps"],
        curve=tuple(p for p in record.curve if points and (p.validation_loss is not None or id(p) in chosen)),
    )

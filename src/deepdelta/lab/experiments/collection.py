"""From records to the results of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from deepdelta.data import Corpus, spread
from deepdelta.lab.analysis.comparisons import analyse
from deepdelta.lab.analysis.results import (
    Budget,
    BudgetName,
    ConditionResult,
    Measurements,
    NGram,
    RunResult,
    StudyResults,
    Tuned,
    Validation,
)
from deepdelta.lab.analysis.results import Corpus as CorpusResult
from deepdelta.lab.experiments.config import Comparison
from deepdelta.lab.experiments.record import RunRecord, merged_rewrites
from deepdelta.lab.measure.cost import Cost
from deepdelta.lab.measure.ngram import WittenBell
from deepdelta.models import parameter_count
from deepdelta.models.flops import training_flops_per_token
from deepdelta.provenance import now, provenance
from deepdelta.training import TrainConfig
from deepdelta.training.step import step_batch

Records = Mapping[tuple[str, int, BudgetName], RunRecord]
"""Records by condition, seed and budget."""

NGRAM, NGRAM_TOKENS = 5, 1 << 24
"""The longest n-gram that is counted, and the most tokens of a run that are."""

CURVE_POINTS, FEWEST_POINTS = 4000, 12
"""Points of all curves together besides validations, and of each at least: what keeps results.json small."""


def collect(
    config: Comparison,
    records: Records,
    costs: Mapping[str, Cost],
    tuned: Mapping[str, Tuned],
    corpus: Corpus,
    *,
    command: str,
    started: str,
    ngram: bool = True,
) -> StudyResults:
    """The results of a study: its records put together and analysed, and what configurations alone decide.

    Args:
        records: at least one; of a study at work some are lacking.
        ngram: whether to count n-grams, which takes a while.
    """
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
        primary=config.primary,
        ngram=counted(settings, corpus, config.seeds) if ngram else None,
    )
    return analyse(measured)


def counted(settings: TrainConfig, corpus: Corpus, seeds: Sequence[int]) -> NGram | None:
    """The loss of NGRAM-grams counted on what runs of these settings read; None where that is too much."""
    vocabulary, context = settings.model.vocab_size or corpus.vocab_size, settings.model.context
    too_long = settings.steps * settings.tokens_per_step > NGRAM_TOKENS
    if vocabulary**NGRAM >= 1 << 63 or too_long or len(corpus.validation) <= context:
        return None
    asked = spread(corpus.validation, context=context, limit=settings.final_eval_tokens or len(corpus.validation))
    losses = {}
    for seed in seeds:
        read = (
            window
            for step in range(settings.steps)
            for inputs, labels in [step_batch(replace(settings, seed=seed), corpus, step)]
            for window in (row[row >= 0] for row in np.concatenate([inputs[:, :1].numpy(), labels.numpy()], axis=1))
        )
        losses[seed] = WittenBell(read, order=NGRAM, vocabulary=vocabulary).loss(asked.numpy())
    corpus.check_unchanged()
    return NGram(order=NGRAM, losses=losses)


def _condition(
    config: Comparison, name: str, records: Records, corpus: Corpus, cost: Cost | None, tuned: Tuned | None
) -> ConditionResult:
    settings = config.train_config(name, config.seeds[0])
    model = replace(settings.model, vocab_size=settings.model.vocab_size or corpus.vocab_size)
    first, *others = config.budgets
    own = [records[name, seed, first] for seed in config.seeds if (name, seed, first) in records]
    points = max(FEWEST_POINTS, CURVE_POINTS // max(1, len(records)))
    shown = {record.name for record in own}
    return ConditionResult(
        name=name,
        summary=config.conditions[name].summary,
        rule=model.residual.rule if model.rival is None else model.rival,
        value_channels=model.residual.value_channels if model.rival is None else 1,
        parameters=parameter_count(model),
        flops_per_token=float(training_flops_per_token(model).training),
        cost=cost,
        runs=tuple(_run(record, points) for record in own),
        rewrites=merged_rewrites(own),
        sample=next((record.sample for record in own if record.sample is not None), None),
        control=config.conditions[name].control,
        factors=config.conditions[name].factors,
        tuned=tuned,
        matched={
            budget: tuple(
                _run(record, 0 if record.name in shown else points)
                for record in (records.get((name, seed, budget)) for seed in config.seeds)
                if record is not None
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

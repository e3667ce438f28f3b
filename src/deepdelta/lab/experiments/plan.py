"""Which runs a study consists of: conditions x seeds at each budget, and before them those that tune or that are
started from.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from deepdelta.data import Corpus, check_context, load_corpus, train_tail
from deepdelta.errors import UserError
from deepdelta.lab.analysis.results import BudgetName, Tuned
from deepdelta.lab.experiments.config import Comparison, Search, StudyConfig
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.experiments.training_run import TrainingRun
from deepdelta.lab.measure.cost import Cost
from deepdelta.models.flops import training_flops_per_token
from deepdelta.progress import show
from deepdelta.training import TrainConfig

Key = TypeVar("Key")
Planned = dict[tuple[str, int, BudgetName], TrainingRun]
"""By condition, seed and budget."""


@dataclass(frozen=True)
class Plan:
    """Makes the runs of a study from its file and its texts."""

    study: StudyConfig
    corpus: Corpus
    tail: Corpus
    """The corpus that `train_tail` makes, on which rates and candidates are chosen."""
    records: RecordFile
    _read: dict[str, TrainConfig] = field(default_factory=dict)

    def steps(self, condition: str, budget: BudgetName, costs: Mapping[str, Cost]) -> int:
        """Optimiser steps of a condition that spend what the baseline's spend.

        With F FLOPs and S seconds per token, 0 marking the baseline: the study's steps n for `tokens`, n F_0 / F for
        `flops` and n S_0 / S for `time`, rounded, at least 1.
        """
        baseline = self.study.baseline
        if budget == "tokens" or condition == baseline:
            return self._settings(condition).steps
        if budget == "flops":
            ratio = self.flops_per_token(baseline) / self.flops_per_token(condition)
        else:
            ratio = costs[condition].speed_ratio
        return max(1, round(self._settings(baseline).steps * ratio))

    def runs(self, study: Comparison, costs: Mapping[str, Cost]) -> Planned:
        """The reported runs; budgets at which a condition makes the same number of steps share theirs."""
        found: Planned = {}
        for seed in study.seeds:
            start = self.start(study, seed)
            for condition in study.conditions:
                by_steps: dict[int, TrainingRun] = {}
                for budget in study.budgets:
                    steps = self.steps(condition, budget, costs)
                    if steps not in by_steps:
                        tag = "" if budget == "tokens" else f"+{budget}"
                        settings = self._settings(condition, seed).stretched(steps)
                        by_steps[steps] = replace(self.run(f"{condition}{tag}", condition, settings), start=start)
                    found[condition, seed, budget] = by_steps[steps]
        return found

    def start(self, study: Comparison, seed: int) -> TrainingRun | None:
        """The run that those of a seed start from, if the study has one."""
        if study.start is None:
            return None
        run = self.run(f"{study.baseline}+start", study.baseline, study.start_config(seed))
        return replace(run, begins_others=True)

    def tuning(self, further: Mapping[str, float] | None = None) -> dict[tuple[str, float, int], TrainingRun]:
        """The runs that tune, by condition, rate and seed: the study's grid, or these further rates by condition."""
        tune = self.study.tune
        if tune is None:
            return {}
        pairs = itertools.product(self.study.conditions, tune.lr) if further is None else further.items()
        found = {}
        for seed, (condition, rate) in itertools.product(tune.seeds, pairs):
            settings = self._settings(condition, seed)
            settings = replace(settings.stretched(tune.steps or settings.steps), lr=rate)
            found[condition, rate, seed] = self.choosing(f"{condition}+tune-lr{rate}", condition, settings)
        return found

    def rung(
        self, study: Search, number: int, conditions: Sequence[str], tuned: Mapping[str, Tuned]
    ) -> dict[tuple[str, int], TrainingRun]:
        """The runs of one rung of a search, by condition and seed; rungs of the same length share theirs."""
        rung = study.search.rungs[number]
        runs = {
            (condition, seed): self.choosing(
                f"{condition}+search-{rung.steps}", condition, self._settings(condition, seed).stretched(rung.steps)
            )
            for seed in rung.seeds
            for condition in conditions
        }
        return at_rates(runs, tuned)

    def rungs(self, study: Search, number: int, left: tuple[str, ...], tuned: Mapping[str, Tuned]) -> list[TrainingRun]:
        """The runs from a rung on. Who goes on from it is not known yet: the first ones stand for as many as will."""
        runs: list[TrainingRun] = []
        for later, rung in enumerate(study.search.rungs[number:], number):
            runs += self.rung(study, later, (study.baseline, *left), tuned).values()
            left = left[: rung.keep]
        return runs

    def choosing(self, label: str, condition: str, settings: TrainConfig) -> TrainingRun:
        """A run on the tail, which no result rests on."""
        settings = replace(settings, data=replace(settings.data, held_out="train_tail"))
        return replace(self.run(label, condition, settings), corpus=self.tail, rewrite_tokens=0)

    def run(self, label: str, condition: str, settings: TrainConfig) -> TrainingRun:
        """The run named '<label>-seed<seed>'."""
        return TrainingRun(
            name=f"{label}-seed{settings.seed}",
            experiment=self.study.name,
            condition=condition,
            seed=settings.seed,
            records=self.records,
            settings=settings,
            corpus=self.corpus,
            rewrite_tokens=self.study.rewrite_tokens,
            keep_weights=self.study.keep_checkpoints,
        )

    def flops_per_token(self, condition: str) -> int:
        model = self._settings(condition).model
        return training_flops_per_token(replace(model, vocab_size=model.vocab_size or self.corpus.vocab_size)).training

    def seconds(self, run: TrainingRun, costs: Mapping[str, Cost]) -> float:
        """Of its steps on a quiet machine and of its last validation, a token of which counts as a third of a trained
        one."""
        settings, held_out = run.settings, len(run.corpus.validation)
        tokens = settings.steps * settings.tokens_per_step + min(settings.final_eval_tokens or held_out, held_out) / 3
        cost = costs.get(run.condition)
        return tokens / cost.tokens_per_second if cost else tokens * self.flops_per_token(run.condition) / 1e10

    def _settings(self, condition: str, seed: int | None = None) -> TrainConfig:
        """The condition's run with a seed, the first unless given; read from the study's file once."""
        if condition not in self._read:
            self._read[condition] = self.study.train_config(condition, self.study.seeds[0])
        settings = self._read[condition]
        return settings if seed is None else replace(settings, seed=seed)


def at_rates(runs: Mapping[Key, TrainingRun], tuned: Mapping[str, Tuned]) -> dict[Key, TrainingRun]:
    """The same runs at the learning rates that were chosen; those of other conditions as they are."""
    return {
        key: replace(run, settings=replace(run.settings, lr=tuned[run.condition].lr)) if run.condition in tuned else run
        for key, run in runs.items()
    }


def plan_of(study: StudyConfig, out: Path) -> Plan:
    """The plan of a study in `out`, its text read.

    Raises:
        UserError: the text is too short for a condition's context, or `out` holds another study.
    """
    if isinstance(study, Comparison) and study.primary is None:
        show(
            f"warning: study {study.name} has no table 'primary': without a comparison named beforehand, what would "
            "refute it and a stop rule, what comes out best looks better than it is (docs/studies.md#comparisons)"
        )
    data = study.train_config(study.baseline, study.seeds[0]).data
    corpus = load_corpus(replace(data, held_out="validation"), progress=show)
    tail, records = train_tail(corpus), RecordFile(out)
    for name in study.conditions:
        for text in (corpus, tail) if study.tune or isinstance(study, Search) else (corpus,):
            check_context(text, study.train_config(name, study.seeds[0]).model.context)
    if (there := records.experiment) not in (None, study.name):
        raise UserError(f"{out} already holds the study '{there}'; give another --out.")
    return Plan(study, corpus, tail, records)

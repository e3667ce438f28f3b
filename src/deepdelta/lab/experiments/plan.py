"""Which runs a study consists of: conditions x seeds at each budget, and before them those that tune or that are
started from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deepdelta.data import Corpus
from deepdelta.lab.analysis.results import BudgetName
from deepdelta.lab.experiments.config import StudyConfig
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.measure.cost import Cost
from deepdelta.lab.measure.flops import training_flops_per_token
from deepdelta.training import RunDirectory, TrainConfig
from deepdelta.training.rundir import CHECKPOINT


@dataclass(frozen=True)
class Run:
    """One run that a study needs, its place, and the corpus that it is trained on."""

    name: str
    """Of its record and its run directory."""
    condition: str
    settings: TrainConfig
    corpus: Corpus
    out: Path
    """The study's folder."""
    records: RecordFile
    """The study's records."""
    work: float
    """Seconds that it is expected to take on a quiet machine."""
    start: "Run | None" = None
    """The run whose weights it starts from."""

    @property
    def path(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def recorded(self) -> bool:
        """Whether it has a record, and so is never run again."""
        return self.name in self.records

    @property
    def launched(self) -> Path:
        """The configuration that the run was launched with."""
        return self.path.with_name(f"{self.name}.json")

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self.path.with_name(f"{self.name}.log")

    @property
    def start_settings(self) -> TrainConfig | None:
        return None if self.start is None else self.start.settings

    @property
    def weights(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def begun(self) -> bool:
        """Whether its directory holds a run, which needs no start any more."""
        return RunDirectory(self.path).started

    @property
    def ended(self) -> bool:
        """Finished, or stopped because its loss was no longer finite, which is a result too."""
        return any(row.get("final") or row.get("diverged") for row in RunDirectory(self.path).metrics())


@dataclass(frozen=True)
class Planner:
    """Makes the runs of a study from its file, its corpus and what its conditions cost."""

    config: StudyConfig
    corpus: Corpus
    costs: Mapping[str, Cost]
    out: Path
    records: RecordFile = field(init=False)
    _read: dict[str, TrainConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "records", RecordFile(self.out))

    def steps(self, condition: str, budget: BudgetName) -> int:
        """Optimiser steps of a condition that spend what the baseline's spend.

        With F FLOPs and S seconds per token, 0 marking the baseline: the study's steps n for `tokens`, n F_0 / F for
        `flops` and n S_0 / S for `time`, rounded, at least 1.
        """
        if budget == "tokens" or condition == self.config.baseline:
            return self._settings(condition).steps
        if budget == "flops":
            ratio = self.flops_per_token(self.config.baseline) / self.flops_per_token(condition)
        else:
            ratio = self.costs[condition].speed_ratio
        return max(1, round(self._settings(self.config.baseline).steps * ratio))

    def runs(self, rates: Mapping[str, float]) -> dict[tuple[str, int, BudgetName], Run]:
        """The reported runs; budgets at which a condition makes the same number of steps share theirs.

        Args:
            rates: tuned learning rates by condition; absent ones are the study's.
        """
        found: dict[tuple[str, int, BudgetName], Run] = {}
        for seed in self.config.seeds:
            start = self.start(seed)
            for condition in self.config.conditions:
                by_steps: dict[int, Run] = {}
                for budget in self.config.budgets:
                    steps = self.steps(condition, budget)
                    if steps not in by_steps:
                        tag = "" if budget == "tokens" else f"+{budget}"
                        settings = self._settings(condition, seed).stretched(steps)
                        settings = replace(settings, lr=rates.get(condition, settings.lr))
                        by_steps[steps] = replace(self.run(f"{condition}{tag}", condition, settings), start=start)
                    found[condition, seed, budget] = by_steps[steps]
        return found

    def start(self, seed: int) -> Run | None:
        """The run that those of a seed start from, if the study has one."""
        if self.config.start is None:
            return None
        return self.run(f"{self.config.baseline}+start", self.config.baseline, self.config.start_config(seed))

    def tuning(self, tail: Corpus) -> dict[tuple[str, float, int], Run]:
        """The runs that tune, by condition, rate and seed, on the corpus that `train_tail` made."""
        tune = self.config.tune
        if tune is None:
            return {}
        return {
            (condition, rate, seed): self.run(
                f"{condition}+tune-lr{rate}",
                condition,
                replace(
                    settings.stretched(tune.steps or settings.steps),
                    lr=rate,
                    data=replace(settings.data, held_out="train_tail"),
                ),
                tail,
            )
            for seed in tune.seeds
            for condition in self.config.conditions
            for settings in [self._settings(condition, seed)]
            for rate in tune.lr
        }

    def rung(
        self, number: int, conditions: Sequence[str], rates: Mapping[str, float], tail: Corpus
    ) -> dict[tuple[str, int], Run]:
        """The runs of one rung of the search, by condition and seed; rungs of the same length share theirs."""
        assert self.config.search is not None
        rung = self.config.search.rungs[number]
        found = {}
        for seed in rung.seeds:
            for condition in conditions:
                settings = self._settings(condition, seed).stretched(rung.steps)
                settings = replace(
                    settings,
                    lr=rates.get(condition, settings.lr),
                    data=replace(settings.data, held_out="train_tail"),
                )
                found[condition, seed] = self.run(f"{condition}+search-{rung.steps}", condition, settings, tail)
        return found

    def run(self, label: str, condition: str, settings: TrainConfig, corpus: Corpus | None = None) -> Run:
        """The run named '<label>-seed<seed>'."""
        corpus = corpus or self.corpus
        return Run(
            f"{label}-seed{settings.seed}",
            condition,
            settings,
            corpus,
            self.out,
            self.records,
            self._work(condition, settings, corpus),
        )

    def flops_per_token(self, condition: str) -> int:
        model = self._settings(condition).model
        return training_flops_per_token(replace(model, vocab_size=model.vocab_size or self.corpus.vocab_size)).training

    def _settings(self, condition: str, seed: int | None = None) -> TrainConfig:
        """The condition's run with a seed, the first unless given; read from the study's file once."""
        if condition not in self._read:
            self._read[condition] = self.config.train_config(condition, self.config.seeds[0])
        settings = self._read[condition]
        return settings if seed is None else replace(settings, seed=seed)

    def _work(self, condition: str, settings: TrainConfig, corpus: Corpus) -> float:
        """Seconds of its steps and of its last validation, a token of which counts as a third of a trained one."""
        held_out = len(corpus.validation)
        tokens = settings.steps * settings.tokens_per_step + min(settings.final_eval_tokens or held_out, held_out) / 3
        cost = self.costs.get(condition)
        return tokens / cost.tokens_per_second if cost else tokens * self.flops_per_token(condition) / 1e10


def starts(runs: Iterable[Run]) -> dict[str, Run]:
    """The runs that these start from, by name."""
    return {run.start.name: run.start for run in runs if run.start is not None}


def untrained(runs: Iterable[Run]) -> list[Run]:
    """Of the runs that these start from, those whose weights an unfinished one needs and that are not there.

    A record alone does not do: where its run directory is gone, the start is trained again.
    """
    needed = starts(run for run in runs if not (run.recorded or run.begun)).values()
    return [one for one in needed if not (one.recorded and one.ended and one.weights.exists())]

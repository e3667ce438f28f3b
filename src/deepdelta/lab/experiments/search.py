"""Successive halving: many candidates for a short time, the best of them for longer and on more seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepdelta.lab.analysis.comparison import Comparison
from deepdelta.lab.analysis.comparisons import contrasts
from deepdelta.lab.analysis.results import Corpus as CorpusResult
from deepdelta.lab.analysis.results import Tuned
from deepdelta.lab.analysis.stored import Stored
from deepdelta.lab.experiments.config import Search
from deepdelta.lab.experiments.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A candidate's result in a rung.

    Fields:
        losses: by seed, nats per token on the last tenth of the training part; None where the run diverged.
        change: from the baseline on the same seeds, corrected for all candidates of the rung; None where none shared.
        kept: whether it went on. A candidate that diverged on a seed ranks last.
    """

    condition: str
    losses: dict[int, float | None]
    mean: float | None
    change: Comparison | None
    kept: bool


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """A rung, best candidate first; the baseline's losses beside them."""

    steps: int
    seeds: tuple[int, ...]
    baseline: dict[int, float | None]
    ranking: tuple[Ranked, ...]


@dataclass(frozen=True, kw_only=True)
class SearchResults(Stored):
    """All of a search. `winners` are the candidates that the last rung kept."""

    name: str
    baseline: str
    finished: str
    corpus: CorpusResult
    tuned: dict[str, Tuned]
    rungs: tuple[RungResult, ...]
    winners: tuple[str, ...]


def rank(
    study: Search, rung: int, candidates: Sequence[str], records: Mapping[tuple[str, int], RunRecord]
) -> RungResult:
    """Order a rung's candidates by mean loss over its seeds.

    Args:
        rung: its number, from 0.
        records: by condition and seed, the baseline's too.
    """
    plan = study.search.rungs[rung]
    losses = {
        name: {seed: records[name, seed].validation_loss for seed in plan.seeds}
        for name in (*candidates, study.baseline)
    }
    means = {
        name: math.fsum(math.inf if x is None else x for x in own.values()) / len(own) for name, own in losses.items()
    }
    order = sorted(candidates, key=means.__getitem__)
    finished = {name: {seed: x for seed, x in own.items() if x is not None} for name, own in losses.items()}
    compared = contrasts(dict.fromkeys(order), study.baseline, finished)
    changes = {one.condition: one.comparison for one in compared}
    return RungResult(
        steps=plan.steps,
        seeds=plan.seeds,
        baseline=losses[study.baseline],
        ranking=tuple(
            Ranked(
                condition=name,
                losses=losses[name],
                mean=means[name] if math.isfinite(means[name]) else None,
                change=changes.get(name),
                kept=place < plan.keep and math.isfinite(means[name]),
            )
            for place, name in enumerate(order)
        ),
    )

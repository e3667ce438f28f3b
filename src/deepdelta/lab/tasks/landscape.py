"""How wide a range of settings trains: a byte GPT at every rate, embedding scale and depth of a grid."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Len

from deepdelta.config import Count, Distinct
from deepdelta.lab.tasks.fitting import Diverged, part_of
from deepdelta.lab.tasks.task import Progress, Task, Variant
from deepdelta.lab.tasks.texts import TEXT_CONDITIONS, TextSettings, loss_on, text_of, trained_at
from deepdelta.models.gpt import Size, Spread
from deepdelta.training.config import Positive

NEAR = 0.05
"""Nats per byte above the best cell within which a cell counts as good."""


@dataclass(frozen=True, kw_only=True)
class LandscapeSettings(TextSettings):
    """What tasks on text have, of a small model, and the grid."""

    rates: Annotated[tuple[Positive, ...], Distinct, Len(1)] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Every cell has one of these."""
    scales: Annotated[tuple[Spread, ...], Distinct, Len(1)] = (0.02, 0.125, 0.5, 2.0)
    """Where embeddings start, in place of `embedding_std`."""
    depths: Annotated[tuple[Size, ...], Distinct, Len(1)] = (8, 24)
    """Layers, in place of `layers`."""
    dim: Size = 32
    context: Size = 64
    steps: Count = 150
    test_tokens: Count = 16384


def run(settings: LandscapeSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train every cell, and compare it with the best of its depth in the same condition.

    Returns:
        share: of all cells, those whose loss on the validation part is within NEAR of the best of their depth; one
        that diverged is not. share_dD, best_dD, and lr_dD and scale_dD of the best: of the cells of D layers.
    """
    text = text_of(settings)
    cells = list(itertools.product(settings.depths, settings.scales, settings.rates))
    losses: dict[int, dict[tuple[float, float], float]] = {depth: {} for depth in settings.depths}
    for number, (depth, scale, rate) in enumerate(cells):
        cell = replace(settings, layers=depth, embedding_std=scale)
        try:
            model = trained_at(cell, text, seed, rate, part_of(progress, number, len(cells)))
        except Diverged:
            continue
        loss = loss_on(text.tested, model, cell)
        if math.isfinite(loss):
            losses[depth][scale, rate] = loss
    per_depth = len(settings.scales) * len(settings.rates)
    found: dict[str, float] = {}
    good = 0
    for depth, own in losses.items():
        if not own:
            raise Diverged(f"no cell of {depth} layers stayed finite: lower the rates.")
        best = min(own, key=own.__getitem__)
        near = sum(loss <= own[best] + NEAR for loss in own.values())
        good += near
        found |= {
            f"share_d{depth}": near / per_depth,
            f"best_d{depth}": own[best],
            f"scale_d{depth}": best[0],
            f"lr_d{depth}": best[1],
        }
    return {"share": good / len(cells)} | found


TASK = Task(
    settings=LandscapeSettings(),
    conditions=TEXT_CONDITIONS
    | {"mhc": Variant(summary="manifold-constrained hyper-connections of four streams", changes={"rival": "mhc"})},
    baseline="additive",
    primary="share",
    unit=f"share of a grid of rates, embedding scales and depths within {NEAR} nats of the best",
    higher_is_better=True,
    run=run,
)

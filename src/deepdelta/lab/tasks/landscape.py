"""How wide a range of settings trains: a byte GPT at every rate, embedding scale and depth of a grid."""

import copy
import itertools
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Len

from deepdelta.config import Count, Distinct
from deepdelta.device import choose_device
from deepdelta.lab.measure.agreement import gradients_of, relative
from deepdelta.lab.tasks.fitting import Diverged, part_of
from deepdelta.lab.tasks.task import Progress, Task, Variant
from deepdelta.lab.tasks.texts import TEXT_CONDITIONS, Text, TextSettings, loss_on, text_of, trained_at, untrained
from deepdelta.models.gpt import Size, Spread
from deepdelta.training.config import Positive
from deepdelta.training.step import step_batch

NEAR = 0.05
"""Nats per byte above the best cell of its depth in the same condition, up to which a cell counts as near it."""


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
    """Train every cell, and test it on the validation part.

    Returns:
        loss: the mean over all cells, none worse than a uniform guess, which is what a cell that diverged counts as.
        loss_dD: of the cells of D layers; best_dD: the lowest of them, and lr_dD and scale_dD where it is; share_dD:
        how many of them are within NEAR of it; share: the mean of these. Without a cell of D layers that stayed finite
        its share is 0 and there is no best. bf16_dD: of D layers the largest error of a gradient in bf16 over the
        scales, as training starts, where all are finite.
    """
    text = text_of(settings)
    guess = math.log(text.trained.vocab_size)
    cells = list(itertools.product(settings.depths, settings.scales, settings.rates))
    losses: dict[int, dict[tuple[float, float], float]] = {depth: {} for depth in settings.depths}
    for number, (depth, scale, rate) in enumerate(cells):
        cell = replace(settings, layers=depth, embedding_std=scale)
        loss = math.inf
        with suppress(Diverged):
            loss = loss_on(text.tested, trained_at(cell, text, seed, rate, part_of(progress, number, len(cells))), cell)
        losses[depth][scale, rate] = loss if math.isfinite(loss) else math.inf
    found: dict[str, float] = {}
    for depth, own in losses.items():
        errors = [
            bf16_error(replace(settings, layers=depth, embedding_std=scale), text, seed) for scale in settings.scales
        ]
        if all(map(math.isfinite, errors)):
            found[f"bf16_d{depth}"] = max(errors)
        found[f"loss_d{depth}"] = sum(min(loss, guess) for loss in own.values()) / len(own)
        scale, rate = min(own, key=own.__getitem__)
        best = own[scale, rate]
        near = sum(loss <= best + NEAR for loss in own.values()) if math.isfinite(best) else 0
        found[f"share_d{depth}"] = near / len(own)
        if near:
            found |= {f"best_d{depth}": best, f"scale_d{depth}": scale, f"lr_d{depth}": rate}
    means = {
        name: sum(found[f"{name}_d{depth}"] for depth in settings.depths) / len(settings.depths)
        for name in ("loss", "share")
    }
    return means | found


def bf16_error(settings: LandscapeSettings, text: Text, seed: int) -> float:
    """|g - g64| / |g64| of the first batch's gradient under bf16 autocast, all parameters as one vector."""
    config, model = untrained(settings, text, seed)
    inputs, labels = step_batch(config, text.trained, 0)
    ids, exact = torch.cat((inputs, labels[:, -1:]), 1), choose_device("cpu", "fp32")
    truth = gradients_of(copy.deepcopy(model).double(), ids, exact)
    return relative(gradients_of(model, ids, replace(exact, precision="bf16")), truth)


TASK = Task(
    settings=LandscapeSettings(),
    conditions=TEXT_CONDITIONS
    | {"mhc": Variant(summary="manifold-constrained hyper-connections of four streams", changes={"rival": "mhc"})},
    baseline="additive",
    primary="loss",
    unit="nats per byte of held-out text, the mean over a grid of rates, embedding scales and depths",
    higher_is_better=False,
    replaced={"lr": "rates", "layers": "depths", "embedding_std": "scales"},
    refuted="the mean of h after a norm is as low as that of the better form with an erase",
    run=run,
)

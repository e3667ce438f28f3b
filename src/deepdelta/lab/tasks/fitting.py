"""What the small tasks share: the training recipe, equal in all conditions of a task, and checks of settings."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer

from deepdelta.config import Count, Settings
from deepdelta.errors import UserError
from deepdelta.lab.experiments.tuning import EXTENSIONS, beyond
from deepdelta.lab.tasks.task import Progress, Variant
from deepdelta.nn import DeltaStream, ResidualConfig
from deepdelta.training import TrainConfig
from deepdelta.training.config import Positive
from deepdelta.training.optimizer import build_optimizer, learning_rate
from deepdelta.training.step import training_step

T = TypeVar("T")
CLIP = 1.0
"""Largest gradient norm."""

CONDITIONS = {
    "additive": Variant(
        summary="the plain residual x + F(norm(x))", changes={"residual": {"rule": "additive", "value_channels": 1}}
    ),
    "write-only": Variant(
        summary="writes along k and never erases, V = 1",
        changes={"residual": {"rule": "write_only", "value_channels": 1}},
    ),
    "delta": Variant(
        summary="the delta rule, V = 1",
        changes={"residual": {"rule": "delta", "value_channels": 1}},
        control="write-only",
    ),
    "write-only-4": Variant(
        summary="writes along k and never erases, V = 4",
        changes={"residual": {"rule": "write_only", "value_channels": 4}},
    ),
    "delta-4": Variant(
        summary="the delta rule, V = 4",
        changes={"residual": {"rule": "delta", "value_channels": 4}},
        control="write-only-4",
    ),
}
"""The plain residual, and the delta rule beside its control that does not erase, with one value channel and with 4."""


NORMED = Variant(
    summary="h is added after a norm whose weight starts at 1/4",
    changes={"out_norm": 0.25, "residual": {"rule": "additive", "value_channels": 1}},
)
DEFAULT_4 = Variant(
    summary="the default at V = 4",
    changes={"residual": {"rule": "additive_erase", "plain_start": True, "value_channels": 4}},
)


def stream_of(residual: ResidualConfig, dim: int, seed: int, **options: Any) -> DeltaStream:
    """A stream with the settings of a task's `residual`; `options` go before them."""
    return DeltaStream(dim, seed=seed, **{**vars(residual), **options})


def with_norm(branch: nn.Sequential, norm: nn.Module, start: float | None) -> nn.Sequential:
    """The branch with a norm of its output whose weight begins at `start`; without a start as it is."""
    if start is not None:
        nn.init.constant_(norm.weight, start)  # type: ignore[arg-type]
        branch.append(norm)
    return branch


def part_of(progress: Progress, number: int, count: int) -> Progress:
    """The progress of part `number` of `count` equal parts of a run."""
    return lambda done, total: progress(number * total + done, count * total)


def at_best_rate(
    rates: Sequence[float], trained: Callable[[float, Progress], T], loss: Callable[[T], float], progress: Progress
) -> tuple[T, float]:
    """What is trained at the rate with the lowest loss on data that no result rests on, and that rate.

    Where it is at an end of the rates, they grow by a step there, at most `EXTENSIONS` times; one alone stays so.

    Raises:
        Diverged: at every rate, training or that loss.
    """
    best: tuple[float, T, float] | None = None
    tried: list[float] = []

    def attempt(rate: float, progress: Progress) -> None:
        nonlocal best
        tried.append(rate)
        with suppress(Diverged):
            made = trained(rate, progress)
            found = loss(made)
            if math.isfinite(found) and (best is None or found < best[0]):
                best = found, made, rate

    for number, rate in enumerate(rates):
        attempt(rate, part_of(progress, number, len(rates)))
    for _ in range(EXTENSIONS):
        further = None if best is None else beyond(best[2], sorted(tried))
        if further is not None:
            attempt(further, lambda done, total: None)
    if best is None:
        raise Diverged(f"no loss stayed finite at the rates {tuple(rates)}: lower them.")
    return best[1:]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own random numbers drawn from `seed` inside, and as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Diverged(UserError):
    """The loss of a run is no longer a finite number, which is a result too: a record without numbers."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings, ABC):
    """How a task trains its networks, the same in all its conditions."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)

    steps: Count
    batch_size: Count
    lr: Positive

    @abstractmethod
    def schedule(self, model: nn.Module) -> tuple[Optimizer, Callable[[int], float]]:
        """The optimiser, and the learning rate of every step."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Recipe):
    """AdamW, warm-up over a tenth of the steps, then a cosine to lr / 10."""

    weight_decay: float = 0.01

    def schedule(self, model: nn.Module) -> tuple[Optimizer, Callable[[int], float]]:
        config = TrainConfig(steps=self.steps, warmup=self.steps // 10, lr=self.lr, weight_decay=self.weight_decay)
        return build_optimizer(model, config), partial(learning_rate, config)


def fit(model: nn.Module, loss_of: Callable[[int], Tensor], recipe: Recipe, progress: Progress) -> None:
    """Minimise loss_of(step), gradients clipped at CLIP.

    Raises:
        Diverged: the loss or a gradient is no longer a finite number.
    """
    optimizer, rate = recipe.schedule(model)
    model.train()
    for step in range(recipe.steps):
        losses = (loss_of(step),)
        made = training_step(model, optimizer, losses, clip=CLIP, rate=rate(step))
        check_loss(*made.read(), step, recipe.lr)
        progress(step + 1, recipe.steps)
    model.eval()


def check_loss(loss: float, norm: float, step: int, lr: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"the training loss must stay finite, got {loss} at step {step} (gradient norm {norm}): lower lr, now {lr}."
        )

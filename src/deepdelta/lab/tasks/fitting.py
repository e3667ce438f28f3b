"""What the small tasks share: the training recipe, equal in all conditions of a task, and checks of settings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from deepdelta.errors import UserError, nearest
from deepdelta.lab.tasks.task import Progress, Variant
from deepdelta.nn import DeltaStream, ResidualConfig
from deepdelta.training import TrainConfig
from deepdelta.training.optimizer import build_optimizer, learning_rate

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


def check_settings(settings: Any, at_least: dict[str, int], *, different: tuple[str, ...] = ()) -> None:
    """Refuse values that settings of a task cannot have.

    That is: Literal fields outside their choices, numbers below their least one, a learning rate that is not positive,
    and of the tuples named in `different` those that are empty or hold a value twice.

    Raises:
        UserError: the first field that does not hold.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value, choices = getattr(settings, name), get_args(kind) if get_origin(kind) is Literal else ()
        if choices and value not in choices:
            raise UserError(
                f"{name} must be one of {', '.join(choices)}, got {value!r}; {nearest(str(value), choices)}"
            )
    for name, low in at_least.items():
        if getattr(settings, name) < low:
            raise UserError(f"{name} must be at least {low}, got {getattr(settings, name)}.")
    for name in different:
        values = getattr(settings, name)
        if not values or len(set(values)) != len(values):
            raise UserError(f"{name} must be different values, at least one, got {list(values)}.")
    if not 0 < settings.lr < float("inf"):
        raise UserError(f"lr must be greater than 0 and finite, got {settings.lr}.")


def stream_of(residual: ResidualConfig, dim: int, seed: int, **options: Any) -> DeltaStream:
    """A stream with the settings of a task's `residual`; `options` go before them."""
    return DeltaStream(dim, seed=seed, **{**vars(residual), **options})


def part_of(progress: Progress, number: int, count: int) -> Progress:
    """The progress of part `number` of `count` equal parts of a run."""
    return lambda done, total: progress(number * total + done, count * total)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own random numbers drawn from `seed` inside, and as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Diverged(UserError):
    """The loss of a run is no longer a finite number, which is a result too: a record without numbers."""


def check_loss(loss: Tensor, step: int, lr: float) -> None:
    if not loss.isfinite():
        raise Diverged(f"the training loss must stay finite, got {loss.item()} at step {step}: lower lr, now {lr}.")


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    progress: Progress,
) -> None:
    """Minimise loss_of(step) by AdamW: warm-up over a tenth of the steps, a cosine to lr / 10, gradients clipped at 1.

    Raises:
        Diverged: the loss is no longer a finite number.
    """
    recipe = TrainConfig(steps=steps, warmup=steps // 10, lr=lr, weight_decay=weight_decay)
    optimizer = build_optimizer(model, recipe)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = loss_of(step)
        check_loss(loss, step, lr)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        progress(step + 1, steps)
    model.eval()

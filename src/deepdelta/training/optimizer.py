"""Parameter groups and the learning-rate schedule."""

import math
from typing import Any

from torch import nn
from torch.optim import AdamW

from deepdelta.errors import UserError
from deepdelta.training.config import TrainConfig

NORMS = (nn.LayerNorm, nn.RMSNorm)
"""The norms of torch whose weights may have several axes."""


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups over any module: decayed, and exempt (gates, biases, norms, reads).

    Exempt are all parameters with fewer than two axes (biases, norm weights, read vectors, scalars) and all
    parameters inside a module that carries `weight_decay_exempt = True` (gates, expansions, compressions).
    Decay on those pulls a trained gate back towards beta = 1 and a read towards 0, whatever the data say.

    Returns:
        Groups for a torch optimiser; a parameter shared by several modules appears once.

    Raises:
        UserError: a negative weight_decay.
    """
    if weight_decay < 0:
        raise UserError(f"weight_decay must be at least 0, got {weight_decay}.")
    exempt = {
        id(parameter)
        for owner in module.modules()
        if getattr(owner, "weight_decay_exempt", False) or isinstance(owner, NORMS)
        for parameter in owner.parameters()
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in exempt]
    rest = [p for p in trained if p.ndim < 2 or id(p) in exempt]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def build_optimizer(module: nn.Module, config: TrainConfig) -> AdamW:
    return AdamW(param_groups(module, config.weight_decay), lr=config.rate, betas=config.betas, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0 .. steps - 1: linear warm-up, then the schedule, which ends at `lr * final_lr`.

    A cosine from `lr`, or `lr` up to the cooldown of c steps and lr (1 - (1 - final_lr) n / c) in its n-th.
    """
    if step < config.warmup:
        return config.rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        cooled = max(0, step + 1 - (config.steps - config.cooldown))
        return config.rate * (1 - (1 - config.final_lr) * cooled / max(1, config.cooldown))
    progress = (step - config.warmup) / max(1, config.steps - config.warmup - 1)
    share = config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.rate * share


def rate_change(there: TrainConfig, here: TrainConfig, step: int) -> str | None:
    """What a run that continues at `step` with other steps is told where its learning rate jumps.

    Args:
        there: the settings that the steps up to `step` were made with; here: those of the next ones.
    """
    was, now = learning_rate(there, min(step, there.steps - 1)), learning_rate(here, min(step, here.steps - 1))
    if was == now:
        return None
    return (
        f"The learning rate jumps from {was:.3g} to {now:.3g} at step {step + 1}: the schedule is that of {here.steps} "
        f"steps now, and was that of {there.steps}. Runs to be extended have no such jump with schedule='constant'; "
        "their last extension may end in a cooldown."
    )

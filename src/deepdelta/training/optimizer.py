"""Parameter groups and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from deepdelta.errors import UserError
from deepdelta.training.config import TrainConfig

NORMS = (nn.LayerNorm, nn.RMSNorm)
"""The norms of torch whose weights may have several axes."""


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Three optimiser groups over any module: matrices, embeddings, and what is exempt from decay.

    Exempt are all parameters with fewer than two axes (biases, norm weights, read vectors, scalars) and all
    parameters inside a module that carries `weight_decay_exempt = True` (gates, expansions, compressions).
    Decay on those pulls a trained gate back towards beta = 1 and a read towards 0, whatever the data say.
    Of the others those with two axes are matrices, which `torch.optim.Muon` takes. Those of an nn.Embedding, also where
    a head is tied to them, and those with more axes are with the embeddings.

    Returns:
        Groups for a torch optimiser, each with its `name`; a parameter shared by several modules appears once.

    Raises:
        UserError: a negative weight_decay.
    """
    if weight_decay < 0:
        raise UserError(f"weight_decay must be at least 0, got {weight_decay}.")
    exempt, embedded = set[int](), set[int]()
    for owner in module.modules():
        if getattr(owner, "weight_decay_exempt", False) or isinstance(owner, NORMS):
            exempt |= {id(parameter) for parameter in owner.parameters()}
        elif isinstance(owner, nn.Embedding):
            embedded.add(id(owner.weight))
    names = ("matrices", "embeddings", "exempt")
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in exempt:
            groups["exempt"].append(parameter)
        else:
            matrix = parameter.ndim == 2 and id(parameter) not in embedded
            groups["matrices" if matrix else "embeddings"].append(parameter)
    decay = {"matrices": weight_decay, "embeddings": weight_decay, "exempt": 0.0}
    return [{"params": groups[name], "weight_decay": decay[name], "name": name} for name in names]


class Together(Optimizer):
    """Optimisers that step one after another, as one: with the groups and the states of all of them."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def build_optimizer(module: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW; or Muon, its update as large as AdamW's, over the matrices, and AdamW over the rest.

    Each group has the learning rate times its `factor`.
    """
    groups = param_groups(module, config.weight_decay)
    factors = {"embeddings": config.embedding_rate, "exempt": config.exempt_rate}
    for group in groups:
        group["factor"] = factors.get(group["name"], 1.0)
        group["lr"] = config.rate * group["factor"]
    # No group has tensors of two types, which torch does not take in one step.
    groups = [group | {"params": some} for group in groups for some in by_type(group["params"]) or [[]]]
    if config.optimizer == "adamw" or not groups[0]["params"]:
        return AdamW(groups, betas=config.betas, fused=True)
    muon = Muon([groups[0]], momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
    return Together(muon, AdamW(groups[1:], betas=config.betas, fused=True))


def by_type(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters, plain ones and those spread over ranks apart."""
    apart: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        apart.setdefault(hasattr(parameter, "placements"), []).append(parameter)
    return [*apart.values()]


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

"""Weight decay only on what it is meant for, under transformers' Trainer and any other optimiser."""

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deepdelta.training import param_groups


class DeltaDecay:
    """Set before `Trainer`: weight decay on what `deepdelta.param_groups` decays, and not on gates, norms and reads.

    class DeltaTrainer(DeltaDecay, Trainer): ...
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        decayed = {id(parameter) for parameter in param_groups(model, 0.0)[0]["params"]}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]


_known: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models that have been trained."""
_unseen: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Those of them whose optimiser has not stepped yet."""


def warn_of_decayed_gates(model: nn.Module) -> None:
    """Look at the first optimiser step over this model's parameters, and warn where it decays gates."""
    if model in _known:
        return
    if not _known:
        register_optimizer_step_pre_hook(_look)
    _known.add(model)
    _unseen.add(model)


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for model in list(_unseen):
        exempt = {id(parameter) for parameter in param_groups(model, 0.0)[1]["params"]}
        groups = [group for group in optimizer.param_groups if any(id(one) in exempt for one in group["params"])]
        if not groups:
            continue
        _unseen.discard(model)
        if any(group.get("weight_decay") for group in groups):
            warnings.warn(
                "this optimiser decays gates, norms or reads of a deepdelta model, which pulls gates towards 1 and "
                "reads towards 0 whatever the data say: take deepdelta.param_groups(model, weight_decay), or "
                "class DeltaTrainer(deepdelta.hf.DeltaDecay, Trainer).",
                stacklevel=3,
            )

"""Weight decay only on what it is meant for, under transformers' Trainer and any other optimiser."""

import warnings
import weakref

from torch import Tensor, nn
from torch.optim import Optimizer

from deepdelta.nn.first_step import at_first_step
from deepdelta.training import param_groups


class DeltaDecay:
    """Set before `Trainer`: weight decay on what `deepdelta.param_groups` decays, and not on gates, norms and reads.

    class DeltaTrainer(DeltaDecay, Trainer): ...
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        exempt = {id(parameter) for parameter in _exempt(model)}
        trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        return [name for name, parameter in trained if id(parameter) not in exempt]


_known: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models that have been trained."""


def warn_of_decayed_gates(model: nn.Module) -> None:
    """Look at the first optimiser step over this model's parameters, and warn where it decays gates."""
    if model not in _known:
        _known.add(model)
        at_first_step(model, _exempt, _look)


def _exempt(model: nn.Module) -> list[Tensor]:
    return param_groups(model, 0.0)[-1]["params"]  # type: ignore[no-any-return]


def _look(model: nn.Module, optimizer: Optimizer) -> None:
    exempt = {id(parameter) for parameter in _exempt(model)}
    groups = [group for group in optimizer.param_groups if any(id(one) in exempt for one in group["params"])]
    if any(group.get("weight_decay") for group in groups):
        warnings.warn(
            "this optimiser decays gates, norms or reads of a deepdelta model, which pulls gates towards 1 and "
            "reads towards 0 whatever the data say: take deepdelta.param_groups(model, weight_decay), or "
            "class DeltaTrainer(deepdelta.hf.DeltaDecay, Trainer).",
            stacklevel=4,
        )

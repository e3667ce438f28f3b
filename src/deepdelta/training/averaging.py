"""Averages of the weights over steps, by torch's `AveragedModel`."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

from deepdelta.training.config import TrainConfig


def averaged(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """What holds the average that the settings ask for: a mean, or a <- d a + (1 - d) w from the first step's w on."""
    if config.average == "none":
        return None
    if config.parallel == "tensor":  # tensor by tensor, since not all of them are of one type
        one = get_swa_avg_fn() if config.average == "last" else get_ema_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        return AveragedModel(model, avg_fn=one)
    if config.average == "last":
        return AveragedModel(model)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]


def follow(average: AveragedModel | None, model: nn.Module, config: TrainConfig, step: int) -> None:
    """Take the weights after a step into the average, where they belong to it."""
    if average is not None and (config.average == "ema" or step > config.steps - config.average_steps):
        average.update_parameters(model)


def begin_anew(average: AveragedModel, config: TrainConfig, step: int) -> None:
    """Forget what a run that is extended at `step` has averaged that is no longer among its last steps."""
    if config.average == "last" and step - int(average.n_averaged) < config.steps - config.average_steps:
        average.n_averaged.zero_()

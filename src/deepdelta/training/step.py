"""One training step: the same for training, for tasks, and wherever its cost is measured."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepdelta.data import Corpus, batch
from deepdelta.device import Device
from deepdelta.training.config import TrainConfig


def step_batch(config: TrainConfig, corpus: Corpus, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels (B, T) of the step after `step`, all of its micro-batches; see `data.batch`."""
    return batch(
        corpus.train,
        seed=config.seed,
        step=step,
        rank=0,
        batch_size=config.batch_size * config.accumulate,
        context=config.model.context,
        ends_at=corpus.ends_at,
    )


def micro_losses(
    forward: nn.Module, inputs: Tensor, labels: Tensor, accumulate: int, chosen: Device
) -> Iterator[Tensor]:
    """The share of each of `accumulate` micro-batches in the loss of a step, one after the other.

    Each is to be taken backward before the next is asked for, so that one micro-batch's activations live at a time.
    """
    for part, part_labels in zip(inputs.chunk(accumulate), labels.chunk(accumulate), strict=True):
        with torch.autocast(chosen.device.type, dtype=torch.bfloat16, enabled=chosen.precision == "bf16"):
            loss = forward(part.to(chosen.device), part_labels.to(chosen.device), loss_alone=True).loss / accumulate
        yield loss


class Made(NamedTuple):
    """What a step gave, on its device until it is read."""

    shares: Tensor
    """The loss of each micro-batch, divided by their number."""
    norm: Tensor
    """Of the gradient, before clipping."""

    def read(self) -> tuple[float, float]:
        """The loss and the gradient norm; waits for the device."""
        return sum(self.shares.tolist()), self.norm.item()


def backward(losses: Iterable[Tensor]) -> Tensor:
    """Add the gradients of every share of a step's loss; the shares."""
    shares = []
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        shares.append(loss.detach())
    return torch.stack(shares)


def update(model: nn.Module, optimizer: Optimizer, clip: float, shares: Tensor | None = None) -> Tensor:
    """Clip the gradients, step where they and the loss are finite, and clear them; their norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    finite = norm.isfinite() if shares is None else norm.isfinite() & shares.isfinite().all()
    if optimizer.defaults.get("fused"):
        # As under torch.amp's GradScaler: where this is 1 the fused step leaves weights and state as they were, and
        # the host need not wait for the device to know.
        optimizer.found_inf = finite.logical_not().to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()
    optimizer.zero_grad()
    return norm


def training_step(
    model: nn.Module, optimizer: Optimizer, losses: Iterable[Tensor], *, clip: float, rate: float | None = None
) -> Made:
    """Backward and update, at the learning rate `rate` or the optimiser's own; the loss and the gradient norm.

    Where one of them is not finite, the model and the optimiser stay as they were.
    """
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate
    shares = backward(losses)
    return Made(shares, update(model, optimizer, clip, shares))

"""One training step: the same for training, for tasks, and wherever its cost is measured."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepdelta.device import Device


def micro_losses(
    forward: nn.Module, inputs: Tensor, labels: Tensor, accumulate: int, chosen: Device
) -> Iterator[Tensor]:
    """The share of each of `accumulate` micro-batches in the loss of a step, one after the other.

    Each is to be taken backward before the next is asked for, so that one micro-batch's activations live at a time.
    """
    for part, part_labels in zip(inputs.chunk(accumulate), labels.chunk(accumulate), strict=True):
        with torch.autocast(chosen.device.type, dtype=torch.bfloat16, enabled=chosen.precision == "bf16"):
            loss = forward(part.to(chosen.device), part_labels.to(chosen.device)).loss / accumulate
        yield loss


def backward(losses: Iterable[Tensor]) -> float:
    """Add the gradients of every share of a step's loss; their sum."""
    total = 0.0
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def update(model: nn.Module, optimizer: Optimizer, clip: float, loss: float = 0.0) -> float:
    """Clip the gradients, step where they and the loss are finite, and clear them; their norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def training_step(
    model: nn.Module, optimizer: Optimizer, losses: Iterable[Tensor], *, clip: float, rate: float | None = None
) -> tuple[float, float]:
    """Backward and update, at the learning rate `rate` or the optimiser's own; the loss and the gradient norm.

    Where one of them is not finite, the model stays as it was.
    """
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate
    loss = backward(losses)
    return loss, update(model, optimizer, clip, loss)

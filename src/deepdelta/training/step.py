"""The forward passes of one training step."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

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

"""Whether two computations of the same thing agree, and how far gradients are from exact ones."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deepdelta.device import Device
from deepdelta.training.step import backward, micro_losses

FLOOR = 1e-5
"""A tensor smaller than this share of the largest is compared with that share: it is rounding."""


def agreement(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest relative error |a - b| / |b| in the 2-norm over the named tensors; infinite if one is not finite."""
    assert ours.keys() == theirs.keys()
    sizes = {name: float(tensor.double().norm()) for name, tensor in theirs.items()}
    least = max(FLOOR * max(sizes.values()), torch.finfo(torch.float32).tiny)
    errors = [
        float((ours[name].double() - theirs[name].double()).norm()) / max(size, least) for name, size in sizes.items()
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")


def loss_and_gradients(forward: nn.Module, owner: nn.Module, ids: Tensor, chosen: Device) -> dict[str, Tensor]:
    """The loss of `forward` on ids (B, T + 1), and the gradients of `owner`'s parameters, which are then cleared."""
    owner.zero_grad()
    (loss,) = backward(micro_losses(forward, ids[:, :-1], ids[:, 1:], 1, chosen))
    found = {"loss": loss.double()} | dict(gradients(owner))
    owner.zero_grad()
    return found


def relative(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """|a - b| / |b|, all tensors as one vector; in fp64. Infinity where it is no number, or b is 0 and a is not."""
    squares = [
        (float((ours[name].double() - b.double()).square().sum()), float(b.double().square().sum()))
        for name, b in theirs.items()
    ]
    error, size = map(sum, zip(*squares, strict=True))
    if error == 0:
        return 0.0
    return (error / size) ** 0.5 if size > 0 and error < math.inf else math.inf


def gradients_of(model: nn.Module, ids: Tensor, chosen: Device) -> dict[str, Tensor]:
    """The gradients of a model's parameters on ids (B, T + 1)."""
    found = loss_and_gradients(model, model, ids, chosen)
    return {name: tensor for name, tensor in found.items() if name != "loss"}


def gradients(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Copies of the gradients that a module's parameters have, by name."""
    for name, parameter in owner.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.clone()

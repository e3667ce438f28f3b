"""One training step: the same for training, for tasks, and wherever its cost is measured."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor, nn
from torch.optim import Optimizer

from deepdelta.data import IGNORED, Corpus, batch
from deepdelta.device import Device
from deepdelta.training.config import TrainConfig
from deepdelta.training.parallel import clip_gradients, synchronising
from deepdelta.training.ranks import ALONE, Ranks


def step_batch(config: TrainConfig, corpus: Corpus, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels (B, T) of the step after `step`, all of its micro-batches on all ranks; see `data.batch`."""
    return batch(
        corpus.train,
        seed=config.seed,
        step=step,
        batch_size=config.batch_size * config.accumulate,
        context=config.model.context,
        ends_at=corpus.ends_at,
        mixture=corpus.mixture,
    )


def step_repeats(config: TrainConfig, step: int) -> int | None:
    """How often the step after `step` repeats a looped GPT's layers, a pure function of (seed, step); None: as often as
    the model's configuration says."""
    if not config.draw_repeats:
        return None
    assert config.model.repeats is not None
    # Of the same key as the batch, from another place: no number serves both.
    numbers = Generator(Philox(key=np.array([config.seed, step], np.uint64), counter=np.array([0, 0, 0, 1], np.uint64)))
    return int(numbers.integers(1, config.model.repeats, endpoint=True))


def micro_losses(
    forward: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    accumulate: int,
    chosen: Device,
    ranks: Ranks = ALONE,
    repeats: int | None = None,
) -> Iterator[Tensor]:
    """The share of each of `accumulate` micro-batches in the loss of a step, one after the other; of several ranks the
    mean of their shares is that of the micro-batch.

    `repeats` is how often a looped GPT repeats its layers in this step, where that is drawn.

    Every label that counts weighs the same in the step's loss, however many each rank has of a micro-batch.

    Each is to be taken backward before the next is asked for, so that one micro-batch's activations live at a time.
    """
    counted, options = (labels != IGNORED).sum(), {} if repeats is None else {"repeats": repeats}
    pairs = zip(inputs.chunk(accumulate), labels.chunk(accumulate), strict=True)
    for number, (part, part_labels) in enumerate(pairs, start=1):
        part, part_labels = ranks.rows(part), ranks.rows(part_labels)
        # As many such parts as there are labels to one of its own: a whole number where all have as many.
        parts = counted / ((part_labels != IGNORED).sum() * ranks.sharing)
        with synchronising(forward, number == accumulate):
            with torch.autocast(chosen.device.type, dtype=torch.bfloat16, enabled=chosen.precision == "bf16"):
                given = part.to(chosen.device), part_labels.to(chosen.device)
                loss = forward(*given, loss_alone=True, **options).loss / parts
            yield loss


class Made(NamedTuple):
    """What a step gave, on its device until it is read."""

    shares: Tensor
    """Of each micro-batch in the loss, which is their sum."""
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


def update(
    model: nn.Module, optimizer: Optimizer, clip: float, shares: Tensor | None = None, ranks: Ranks = ALONE
) -> Made:
    """Clip the gradients, step where they and the loss are finite on every rank, and clear them; the loss of all ranks
    and the norm before clipping."""
    norm = clip_gradients(model, clip)
    shares = norm.new_zeros(1) if shares is None else shares
    finite = norm.isfinite() & shares.isfinite().all()
    if ranks.size > 1:
        # In one sum, of which every rank gets the same bits, so that all of them step or none does.
        told = ranks.summed(torch.cat((shares / ranks.size, (~finite).to(shares.dtype)[None])))
        shares, finite = told[:-1], told[-1] == 0
    if optimizer.defaults.get("fused"):
        # As under torch.amp's GradScaler: where this is 1 the fused step leaves weights and state as they were, and
        # the host need not wait for the device to know.
        optimizer.found_inf = finite.logical_not().to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()
    optimizer.zero_grad()
    return Made(shares, norm)


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    losses: Iterable[Tensor],
    *,
    clip: float,
    rate: float | None = None,
    ranks: Ranks = ALONE,
) -> Made:
    """Backward and update, at the learning rate `rate` or the optimiser's own; the loss and the gradient norm.

    Where one of them is not finite, the model and the optimiser stay as they were.
    """
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
    return update(model, optimizer, clip, backward(losses), ranks)

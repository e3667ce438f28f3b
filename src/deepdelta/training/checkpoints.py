"""A run's checkpoints: safetensors with a checksum each, the last one, those before it and the best."""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from deepdelta.errors import UserError
from deepdelta.files import atomic_path, naming
from deepdelta.tensors import check_finite, load_tensors, save_tensors
from deepdelta.training.parallel import fill, whole
from deepdelta.training.ranks import ALONE, Ranks

CHECKPOINT, BEST, AVERAGE = "checkpoint.safetensors", "best.safetensors", "average.safetensors"
"""The last one, the one of the lowest validation loss, and one of averaged weights."""
EARLIER = "checkpoints"
"""The folder of those before the last."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds: tensors by the model's names, and by the model's names and the optimiser's."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    step: int
    seconds: float
    """Of training, up to this step."""
    average: dict[str, Tensor]
    """What `AveragedModel` holds; empty where nothing is averaged."""


def state_of(
    model: nn.Module, optimizer: Optimizer | None, average: AveragedModel | None, ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """Weights, optimiser state and average by the names of a checkpoint; every rank must ask, the first gets them.

    Of a sharded model one tensor at a time is put together, and kept in the first rank's host memory.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in (average.state_dict() if average else {}).items()}
    for name, parameter in model.named_parameters():
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    if not ranks.started_together:
        return tensors
    held = {}
    for name, tensor in tensors.items():
        one = whole(tensor)
        if ranks.first:
            held[name] = one.detach().cpu()
    return held


def write_checkpoint(file: Path, tensors: Mapping[str, Tensor], step: int, seconds: float) -> None:
    """Write what `state_of` gave, step and training seconds as one file, whole or not at all."""
    save_tensors(file, tensors, {"step": str(step), "seconds": repr(seconds)})


def read_checkpoint(file: Path) -> Checkpoint:
    """A checkpoint, verified.

    Raises:
        UserError: there is none, or it is not as it was written.
    """
    run = file.parent.parent if file.parent.name == EARLIER else file.parent
    if not file.exists():
        raise UserError(f"{run} holds no {file.name}; restore it, or delete the directory and train anew.")
    mend = f"restore a copy, or delete {run} and train anew"
    tensors, metadata = load_tensors(file, mend)
    if not {"step", "seconds"} <= metadata.keys():
        raise UserError(f"{file} must be a checkpoint, but has no step; {mend}.")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    step, seconds = int(metadata["step"]), float(metadata["seconds"])
    return Checkpoint(parts["model"], parts["optimizer"], step, seconds, parts["average"])


def keep_last(run: Path, step: int, last: int) -> None:
    """Have EARLIER hold the last checkpoint, just written at `step`, and the `last` - 1 before it, and no others.

    The last one is there as a second name of the same file, so it takes no room until the next is written.

    Raises:
        UserError: it cannot be written.
    """
    folder = run / EARLIER
    if last == 1 and not folder.exists():
        return
    with naming(folder, "written"):
        folder.mkdir(exist_ok=True)
        here = folder / name_of(step)
        here.unlink(missing_ok=True)
        try:
            here.hardlink_to(run / CHECKPOINT)
        except OSError:  # a file system without links
            shutil.copyfile(run / CHECKPOINT, here)
        # What is of later steps is of a run that was damaged there, and those steps are made again.
        kept = [file for file in earlier(run) if file.name <= here.name][:last]
        for file in earlier(run):
            if file not in kept:
                file.unlink()
        if last == 1:
            shutil.rmtree(folder)


def name_of(step: int) -> str:
    """The file in EARLIER."""
    return f"step-{step:012d}.safetensors"


def earlier(run: Path) -> list[Path]:
    """The checkpoints in EARLIER, the last first."""
    return sorted((run / EARLIER).glob("step-*.safetensors"), reverse=True)


def last_good(run: Path, say: Callable[[str], None]) -> Checkpoint:
    """The last checkpoint. Where it is damaged or gone, the last before it that is neither, put in its place; said.

    Raises:
        UserError: none is good; what is wrong with the last.
    """
    last = run / CHECKPOINT
    problem: UserError | None = None
    for file in (last, *(one for one in earlier(run) if not (last.exists() and os.path.samefile(one, last)))):
        try:
            checkpoint = read_checkpoint(file)
        except UserError as error:
            problem = problem or error
            continue
        if problem is not None:
            say(f"{problem} Going on from the checkpoint before it instead, {file}.")
            with atomic_path(last) as copied:
                shutil.copyfile(file, copied)
        return checkpoint
    assert problem is not None
    raise problem


def load_into(model: nn.Module, checkpoint: Checkpoint, file: Path, absent: Collection[str] = ()) -> None:
    """Load a checkpoint's weights, of that file, into `model`; those in `absent` keep their start where it has none.

    Raises:
        UserError: tensors that do not fit the model or are not finite.
    """
    check_fits(model, checkpoint, file, absent)
    model.load_state_dict(model.state_dict() | checkpoint.weights)


def check_fits(model: nn.Module, checkpoint: Checkpoint, file: Path, absent: Collection[str] = ()) -> None:
    """Refuse weights that are not those of `model`; it may hold those in `absent` besides.

    Raises:
        UserError: tensors that do not fit the model or are not finite.
    """
    tensors, own = checkpoint.weights, model.state_dict()
    missing, unknown = sorted(set(own) - set(tensors) - set(absent)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise UserError(
            f"{file} does not fit this model: missing tensors {missing[:5]}, unknown tensors {unknown[:5]}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{file} does not fit this model: '{name}' has shape {tuple(tensor.shape)}, the model's has "
                f"{tuple(own[name].shape)}."
            )
    check_finite(tensors, file)


def restore(
    run: Path,
    model: nn.Module,
    optimizer: Optimizer,
    average: AveragedModel | None,
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> tuple[int, float]:
    """Load the last checkpoint's weights, optimiser state and average, or, where it is damaged, those of the one
    before it, which is said; the step and the training seconds that it was made at.

    The first of several ranks reads it and gives the others theirs, so it matters nothing how many wrote it.

    Raises:
        UserError: see `last_good` and `check_fits`.
    """
    found = Checkpoint({}, {}, 0, 0.0, {})

    def read() -> tuple[int, float, dict[str, list[int]]]:
        nonlocal found
        found = last_good(run, say)
        check_fits(model, found, run / CHECKPOINT)
        return found.step, found.seconds, {name: [*tensor.shape] for name, tensor in found.optimizer.items()}

    step, seconds, shapes = ranks.shared(read)
    fill(model.state_dict(), found.weights, ranks)
    states = {}
    for name, parameter in model.named_parameters():
        for key in (key for key in shapes if key.startswith(f"{name}.")):
            # Sharded as the parameter is, or a count of steps.
            alike = shapes[key] == [*parameter.shape] and parameter.ndim
            state = torch.zeros_like(parameter) if alike else torch.zeros(shapes[key], device=parameter.device)
            states[key] = optimizer.state[parameter][key.removeprefix(f"{name}.")] = state
    fill(states, found.optimizer, ranks)
    if average is not None:
        fill(average.state_dict(), found.average, ranks)
    return step, seconds

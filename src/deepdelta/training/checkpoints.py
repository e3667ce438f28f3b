"""A run's checkpoints: safetensors with a checksum each, the last one, those before it and the best."""

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from deepdelta.errors import UserError
from deepdelta.files import atomic_path, naming
from deepdelta.tensors import check_finite, load_tensors, save_tensors

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


def write_checkpoint(
    file: Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    step: int,
    seconds: float,
    average: AveragedModel | None = None,
) -> None:
    """Write weights, optimiser state, average, step and training seconds as one file, whole or not at all."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors |= {f"average.{name}": tensor for name, tensor in (average.state_dict() if average else {}).items()}
    for parameter, state in (optimizer.state if optimizer else {}).items():
        for key, value in state.items():
            tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
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
    model.load_state_dict(own | tensors)

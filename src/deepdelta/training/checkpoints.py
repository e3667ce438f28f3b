"""A run's checkpoints: the last one, those before it and the best; each in files of its own (`parts`)."""

import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from deepdelta.errors import UserError
from deepdelta.files import atomic_path, naming
from deepdelta.limits import check_memory
from deepdelta.tensors import check_finite
from deepdelta.training.parallel import fill, local
from deepdelta.training.parts import EARLIER, Stored, piece
from deepdelta.training.ranks import ALONE, Ranks

CHECKPOINT, BEST, AVERAGE = "checkpoint.safetensors", "best.safetensors", "average.safetensors"
"""The last one, the one of the lowest validation loss, and one of averaged weights."""
T = TypeVar("T")


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
    model: nn.Module, optimizer: Optimizer | None = None, average: AveragedModel | None = None
) -> dict[str, Tensor]:
    """Weights, optimiser state and average by the names of a checkpoint."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in (average.state_dict() if average else {}).items()}
    for name, parameter in model.named_parameters():
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def read_checkpoint(file: Path) -> Checkpoint:
    """A checkpoint, verified and whole, however many processes wrote it.

    Raises:
        UserError: there is none, or it is not as it was written.
    """
    stored = Stored(file, otherwise=_otherwise(file))
    held = sum(part.values.nbytes for pieces in stored.pieces.values() for part in pieces)
    check_memory(held, f"what {file} and its parts hold")
    kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
    for key in stored.pieces:
        kind, _, name = key.partition(".")
        kinds[kind][name] = stored.whole(key)
    return Checkpoint(kinds["model"], kinds["optimizer"], stored.step, stored.seconds, kinds["average"])


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


def before_last(run: Path) -> list[Path]:
    """Those of them that are not the last checkpoint under its second name, the last first."""
    last = run / CHECKPOINT
    return [file for file in earlier(run) if not (last.exists() and file.samefile(last))]


def _otherwise(file: Path) -> str | None:
    """What there is to do without a good copy of a run's last checkpoint, where there is one before it."""
    if file.name != CHECKPOINT or not (there := before_last(file.parent)):
        return None
    return f"go on from the one before it, {EARLIER}/{there[0].name}, by the command that trained it"


def kept(run: Path) -> list[Path]:
    """All checkpoints of a run: the last, the best, averaged weights and those in EARLIER."""
    there = [run / name for name in (CHECKPOINT, BEST, AVERAGE)]
    return [file for file in there if file.exists()] + earlier(run)


def last_good(run: Path, say: Callable[[str], None], ranks: Ranks = ALONE, readers: int = 1) -> Stored | None:
    """The last checkpoint. Where it is damaged or gone, the last before it that is neither, put in its place; said.

    Args:
        readers: how many of the ranks read it, the first ones; the others get None.

    Raises:
        UserError: none is good; what is wrong with the last.
    """
    last, first_problem = run / CHECKPOINT, None

    for file in map(Path, ranks.shared(lambda: [str(last), *map(str, before_last(run))])):
        stored, problem = None, None
        try:
            stored = Stored(file, ranks.rank, readers, _otherwise(file)) if ranks.rank < readers else None
        except UserError as error:
            problem = str(error)
        found = next(filter(None, ranks.gathered(problem)), None)
        first_problem = first_problem or found
        if found:
            continue
        if first_problem:
            say(f"{first_problem} Going on from the checkpoint before it instead, {file}.")
            ranks.shared(partial(_put, file, last))
        return stored
    raise UserError(first_problem or f"{run} holds no checkpoint.")


def _put(file: Path, last: Path) -> None:
    with atomic_path(last) as copied:
        shutil.copyfile(file, copied)


def load_into(model: nn.Module, checkpoint: Checkpoint, file: Path, absent: Collection[str] = ()) -> None:
    """Load a checkpoint's weights, of that file, into `model`; those in `absent` keep their start where it has none.

    Raises:
        UserError: tensors that do not fit the model or are not finite.
    """
    weights = checkpoint.weights
    check_fits(model, {name: (*tensor.shape,) for name, tensor in weights.items()}, file, absent)
    check_finite(weights, file)
    model.load_state_dict(model.state_dict() | weights)


def check_fits(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], file: Path, absent: Collection[str] = ()
) -> None:
    """Refuse weights that are not those of `model`; it may hold those in `absent` besides.

    Raises:
        UserError: tensors that do not fit the model.
    """
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(shapes) - set(absent)), sorted(set(shapes) - set(own))
    if missing or unknown:
        raise UserError(
            f"{file} does not fit this model: missing tensors {missing[:5]}, unknown tensors {unknown[:5]}."
        )
    for name, shape in shapes.items():
        if shape != own[name].shape:
            raise UserError(
                f"{file} does not fit this model: '{name}' has shape {shape}, the model's has {tuple(own[name].shape)}."
            )


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

    Of what is spread over the ranks each reads its own, so it matters nothing how many wrote it; what each has whole
    the first one reads for all.

    Raises:
        UserError: see `last_good`, `check_fits` and `check_finite`.
    """
    spread = any(piece(tensor) for tensor in model.state_dict().values())
    stored = last_good(run, say, ranks, ranks.size if spread else 1)

    def found() -> tuple[int, float, dict[str, list[int]]]:
        assert stored is not None
        check_fits(model, _of("model", stored.shapes), run / CHECKPOINT)
        return stored.step, stored.seconds, {key: [*shape] for key, shape in stored.shapes.items()}

    step, seconds, shapes = ranks.shared(found)
    _load(model.state_dict(), "model", stored, ranks)
    check_finite({name: local(tensor) for name, tensor in model.state_dict().items()}, run / CHECKPOINT)
    ranks.gathered(None)  # so that where one of them finds such weights the others hear of it here
    states, of_optimizer = {}, _of("optimizer", shapes)
    for name, parameter in model.named_parameters():
        for key in (key for key in of_optimizer if key.startswith(f"{name}.")):
            # Spread as the parameter is, or a count of steps.
            shape = of_optimizer[key]
            alike = shape == [*parameter.shape] and parameter.ndim
            state = torch.zeros_like(parameter) if alike else torch.zeros(shape, device=parameter.device)
            states[key] = optimizer.state[parameter][key.removeprefix(f"{name}.")] = state
    _load(states, "optimizer", stored, ranks)
    if average is not None:
        _load(average.state_dict(), "average", stored, ranks)
    return step, seconds


def _of(kind: str, entries: Mapping[str, T]) -> dict[str, T]:
    """Those of a checkpoint's entries that are of this kind, by their names there."""
    return {key.removeprefix(f"{kind}."): entry for key, entry in entries.items() if key.startswith(f"{kind}.")}


@torch.no_grad()
def _load(tensors: Mapping[str, Tensor], kind: str, stored: Stored | None, ranks: Ranks) -> None:
    whole = {}
    for name, tensor in tensors.items():
        if (own := piece(tensor)) is None:
            whole[name] = tensor
        else:
            assert stored is not None, "each rank reads what it has a piece of"
            own.values.copy_(stored.block(f"{kind}.{name}", own.offset, own.values.shape))

    def value(name: str) -> Tensor:
        assert stored is not None
        return stored.whole(f"{kind}.{name}")

    fill(whole, value, ranks)

"""The files of a checkpoint, and the tensors in them, of which several processes may each hold a piece.

NAME.safetensors   what is whole; in its metadata step, training seconds and, as JSON, each part's checksum
parts/NAME-STEP-RANK-of-SIZE.safetensors   of each process with pieces; in its metadata, as JSON, where they lie

A part is written under a name of its own. The first file is written last, in place of the one before it: with it the
checkpoint is there. One process writes no parts.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.files import naming, parse, remove_abandoned
from deepdelta.tensors import load_tensors, save_tensors
from deepdelta.training.parallel import local
from deepdelta.training.ranks import ALONE, Ranks

PARTS = "parts"
"""The folder of parts, of all checkpoints of a run."""
EARLIER = "checkpoints"
"""The folder of the checkpoints before the last."""

_PART = re.compile(r"[a-z]+-(\d{12})-\d+-of-\d+\.safetensors")


class Piece(NamedTuple):
    """A block of a tensor."""

    values: Tensor
    offset: tuple[int, ...]
    """Its first element in the tensor."""
    shape: tuple[int, ...]
    """Of the tensor."""


def piece(tensor: Tensor) -> Piece | None:
    """What this process holds of a tensor that is spread over several; None where each has all of it."""
    spread: Any = tensor
    placements = getattr(spread, "placements", ())
    if not any(placement.is_shard() for placement in placements) or spread.device_mesh.size() == 1:
        return None
    (placement,) = placements
    axis = placement.dim
    length = -(-spread.shape[axis] // spread.device_mesh.size())
    first = min(spread.device_mesh.get_local_rank() * length, spread.shape[axis])
    offset = tuple(first if number == axis else 0 for number in range(spread.ndim))
    return Piece(local(spread), offset, tuple(spread.shape))


class Snapshot(NamedTuple):
    """What one process has to write of a checkpoint, by name."""

    whole: dict[str, Tensor]
    """On the first process."""
    pieces: dict[str, Piece]
    spread: bool
    """Whether any process has pieces."""


@torch.no_grad()
def snapshot(tensors: Mapping[str, Tensor], ranks: Ranks = ALONE, *, copied: bool = False) -> Snapshot:
    """What this process has to write of these tensors; `copied` to host memory, so that they may change meanwhile."""

    def held(tensor: Tensor) -> Tensor:
        if not copied:
            return tensor.detach()
        return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)

    whole, pieces, spread = {}, {}, False
    for name, tensor in tensors.items():
        part = piece(tensor)
        if part is not None:
            spread = True
            if part.values.numel():
                pieces[name] = part._replace(values=held(part.values))
        elif ranks.first:
            whole[name] = held(local(tensor))
    return Snapshot(whole, pieces, spread)


def write_parts(
    file: Path, held: Snapshot, step: int, ranks: Ranks, key: str, given_up: Callable[[], bool]
) -> dict[str, str]:
    """Write this process's pieces of the checkpoint `file`, where there are any; for the first process, the names and
    checksums of all parts, as soon as they are written.

    Raises:
        UserError: a part cannot be written.
    """
    if not held.spread:
        return {}
    try:
        ranks.hand_in(key, [_written(file, held.pieces, step, ranks), None])
    except UserError as error:
        ranks.hand_in(key, [None, str(error)])
        raise
    told = ranks.handed_in(key, given_up) if ranks.first else []
    if problem := next((problem for _, problem in told if problem), None):
        raise UserError(problem)
    return dict(part for part, _ in told if part)


def _written(file: Path, pieces: Mapping[str, Piece], step: int, ranks: Ranks) -> tuple[str, str] | None:
    """The part's name and checksum; None without pieces."""
    if not pieces:
        return None
    name = f"{file.stem}-{step:012d}-{ranks.rank}-of-{ranks.size}.safetensors"
    places = json.dumps({key: [part.offset, part.shape] for key, part in pieces.items()})
    tensors = {key: part.values for key, part in pieces.items()}
    return name, save_tensors(file.parent / PARTS / name, tensors, {"pieces": places})


def write_checkpoint(
    file: Path, tensors: Mapping[str, Tensor], step: int, seconds: float, parts: Mapping[str, str] | None = None
) -> None:
    """Write whole tensors, step, training seconds and the checksums of the parts as one file, whole or not at all.

    Raises:
        UserError: it cannot be written, or a part is not where this process looks for it.
    """
    for part in parts or {}:
        if not (there := file.parent / PARTS / part).exists():
            raise UserError(
                f"{there} has been written by another process, but is not there for the first: all processes need one "
                "file system for the run directory."
            )
    metadata = {"step": str(step), "seconds": repr(seconds)}
    save_tensors(file, tensors, metadata | ({"parts": json.dumps(parts)} if parts else {}))


class Stored:
    """A checkpoint in its files; no tensor is read before it is asked for.

    Args:
        file: the first of its files.
        reader, readers: of so many processes that read it, each holds its share of the files against their checksums.
        otherwise: what there is to do without a good copy, for messages; by default to train anew.

    Raises:
        UserError: there is none, or it is not as it was written; naming the file.
    """

    def __init__(self, file: Path, reader: int = 0, readers: int = 1, otherwise: str | None = None) -> None:
        run = file.parent.parent if file.parent.name == EARLIER else file.parent
        otherwise = otherwise or f"delete {run} and train anew"
        if not file.exists():
            raise UserError(f"{run} holds no {file.name}; restore it, or {otherwise}.")
        self.file, mend = file, f"restore a copy, or {otherwise}"
        tensors, metadata = load_tensors(file, mend, verify=reader == 0)
        if not {"step", "seconds"} <= metadata.keys():
            raise UserError(f"{file} must be a checkpoint, but has no step; {mend}.")
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.pieces = {name: [Piece(tensor, (0,) * tensor.ndim, (*tensor.shape,))] for name, tensor in tensors.items()}
        for number, (part, checksum) in enumerate(_index(metadata, file, mend).items(), start=1):
            path = run / PARTS / part
            if not path.exists():
                raise UserError(f"{path} is gone, a part of {file}; {mend}.")
            here = number % readers == reader
            tensors, metadata = load_tensors(path, mend, checksum=checksum, verify=here)
            for name, (offset, shape) in parse(metadata.get("pieces", "{}"), str(path), mend).items():
                if name in tensors:
                    self.pieces.setdefault(name, []).append(Piece(tensors[name], tuple(offset), tuple(shape)))
        self.shapes = {name: pieces[0].shape for name, pieces in self.pieces.items()}
        for name, pieces in self.pieces.items():
            if sum(part.values.numel() for part in pieces) != math.prod(self.shapes[name]):
                raise UserError(f"{file} is damaged: its parts do not make '{name}'; {mend}.")

    def block(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """That of a tensor which begins at `offset`."""
        first, *others = self.pieces[name]
        if not others and first.offset == tuple(offset) and first.values.shape == tuple(size):
            return first.values
        found = torch.empty(*size, dtype=first.values.dtype)
        for values, start, _ in self.pieces[name]:
            low = [max(pair) for pair in zip(start, offset, strict=True)]
            ends = zip(start, values.shape, offset, size, strict=True)
            high = [min(a + length, b + wanted) for a, length, b, wanted in ends]
            if all(a < b for a, b in zip(low, high, strict=True)):
                theirs = _slices(low, high, start)
                found[_slices(low, high, offset)] = values[theirs]
        return found

    def whole(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.block(name, (0,) * len(shape), shape)


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _index(metadata: Mapping[str, str], file: Path, mend: str) -> dict[str, str]:
    """Checksums by the names of the parts."""
    index: dict[str, str] = parse(metadata.get("parts", "{}"), str(file), mend)
    if strange := [part for part in index if not _PART.fullmatch(part)]:
        raise UserError(f"{file} names '{strange[0]}', which is no part of a checkpoint; {mend}.")
    return index


def parts_of(run: Path) -> dict[Path, int]:
    """The parts in a run directory, with the steps in their names."""
    found = sorted((run / PARTS).glob("*.safetensors"))
    return {file: int(match[1]) for file in found if (match := _PART.fullmatch(file.name))}


def keep_parts(run: Path, checkpoints: Sequence[Path]) -> None:
    """Delete parts that none of these checkpoints has.

    Raises:
        UserError: they cannot be deleted.
    """
    if not (there := parts_of(run)):
        return
    kept: set[str] = set()
    for file in checkpoints:
        with suppress(UserError):  # a damaged one, of which no part is of use
            kept |= _index(load_tensors(file, "", verify=False)[1], file, "").keys()
    delete([file for file in there if file.name not in kept], run)


def delete(parts: Sequence[Path], run: Path) -> None:
    """Delete parts, and their folder where nothing else is in it.

    Raises:
        UserError: they cannot be deleted.
    """
    with naming(run / PARTS, "written"):
        remove_abandoned(run / PARTS)
        for file in parts:
            file.unlink(missing_ok=True)
    with suppress(OSError):  # there are others
        (run / PARTS).rmdir()

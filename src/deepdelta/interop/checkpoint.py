"""From a folder with a published checkpoint to a run directory that every other command takes."""

import struct
from pathlib import Path
from pickle import UnpicklingError  # what torch raises for a file that holds more than tensors
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.files import AnyPath, check_readable, read_object
from deepdelta.limits import check_memory

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt", "checkpoint.pt")
"""Names that a published checkpoint's tensors go by, in the order of preference."""

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Names that the list of its files goes by where its tensors are in several."""

HOLDERS = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which training programs keep the tensors in a file that holds more, such as the optimiser's state."""

# An unreadable file, and what the readers raise on damaged bytes: pickle, by its documentation, keeps no closed list,
# and struct and the decoders below it raise what they come to first.
DAMAGED = (
    OSError,
    SafetensorError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)


def read_published(folder: AnyPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration keys and the tensors of a checkpoint folder; tensors only, no code of the file is run.

    Raises:
        UserError: a file is missing, damaged, or holds something other than tensors.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} must hold the model's config.json, but does not.")
    keys = read_object(config, "restore the checkpoint's own")
    tensors: dict[str, Tensor] = {}
    files, listed = _files(folder)
    for file in files:
        part = _read_tensors(file)
        if twice := sorted(part.keys() & tensors.keys()):
            raise UserError(f"{file} holds '{twice[0]}', which another file of {folder} holds too; leave one out.")
        tensors |= part
    if lost := sorted(listed - tensors.keys()):
        raise UserError(f"{folder} lists '{lost[0]}', which none of its files holds; restore the checkpoint's own.")
    return keys, tensors


def _files(folder: Path) -> tuple[list[Path], set[str]]:
    """The files that hold the checkpoint's tensors; where they are several, also the names listed with them."""
    single = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if single is not None:
        return [single], set()
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is None:
        raise UserError(
            f"{folder} must hold the model's tensors as one of {', '.join(WEIGHTS)}, or {' or '.join(INDEXES)} and the "
            "files listed there, but does not."
        )
    listed = read_object(index, "restore the checkpoint's own").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} must list the files of the tensors under 'weight_map', but does not.")
    names = sorted(map(str, listed.values()))
    for name in names:
        # A plain name: an index must not reach out of its folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index} must list files beside it, but '{name}' is none.")
    return [folder / name for name in dict.fromkeys(names)], set(listed)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    check_readable(file, "Have it made readable for you.")
    check_memory(file.stat().st_size, f"what {file} holds")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # weights_only: the reader builds tensors and containers and refuses everything else.
        held = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(
            f"{file} holds more than tensors, which would mean running its code, or is damaged; save the model's "
            "state_dict alone, best as model.safetensors."
        ) from None
    except DAMAGED as error:
        raise UserError(f"{file} does not hold a readable set of tensors: {error}") from None
    if isinstance(held, dict) and not _are_tensors(held):
        held = next((held[key] for key in HOLDERS if _are_tensors(held.get(key))), held)
    if not _are_tensors(held):
        raise UserError(
            f"{file} must hold a dictionary of tensors by name, alone or under one of the keys {', '.join(HOLDERS)}."
        )
    return dict(held)


def _are_tensors(held: Any) -> bool:
    return isinstance(held, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items())

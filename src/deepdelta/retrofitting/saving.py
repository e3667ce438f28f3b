"""A retrofit in a folder: its options as JSON and its tensors as safetensors.

The JSON file names the tensors' file and is written last, so that who loads finds the old pair or the whole new one.
"""

import re
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepdelta.config import to_plain
from deepdelta.errors import UserError
from deepdelta.files import atomic_path, read_object, write_json
from deepdelta.retrofitting.core import Model, record_of, retrofit, undo_retrofit

SETTINGS = "retrofit.json"
TENSORS = re.compile(r"retrofit-[0-9a-f]{16}\.safetensors")


def save_retrofit(model: nn.Module, folder: str | Path) -> None:
    """Write a retrofitted model's options and tensors to `folder`.

    With trainable='all' every tensor of the model is written, with 'residual' those that the retrofit added and the
    buffers, which training changes too (the statistics of batch norms): the other parameters are the plain model's.

    Raises:
        UserError: the model was not retrofitted.
    """
    record, folder = record_of(model), Path(folder)
    config = record.job.config
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in _kept(model).items()}
    name = f"retrofit-{secrets.token_hex(8)}.safetensors"
    with atomic_path(folder / name) as temporary:
        save_file(contiguous, temporary)
    write_json(folder / SETTINGS, {"families": record.families, "options": to_plain(config), "tensors": name})
    for old in folder.glob("retrofit-*.safetensors"):
        if old.name != name and TENSORS.fullmatch(old.name):
            old.unlink()


def load_retrofit(model: Model, folder: str | Path) -> Model:
    """Retrofit `model`, in place, with the options and the tensors that `save_retrofit` wrote to `folder`.

    Args:
        model: a plain model of the same architecture; for trainable='residual' with the weights that were retrofitted.

    Raises:
        UserError: no retrofit in the folder, a damaged one, tensors that are missing in it or unknown to the model or
            of another shape, each named; or what `retrofit` raises. The model is then as it was.
    """
    folder = Path(folder)
    settings = _settings(folder)
    file = folder / settings["tensors"]
    try:
        with file.open("rb"):  # for the true reason: of each file that it cannot open, the library says there is none
            tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); restore a copy, or save the model anew.") from None
    retrofit(model, **settings["options"])
    try:
        own = _kept(model)
        _check(file, tensors, own)
    except BaseException:
        undo_retrofit(model)
        raise
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return model


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, tied ones under the first of their names alone."""
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """What is written of a retrofitted model."""
    record, own = record_of(model), distinct(model)
    if record.job.config.trainable == "all":
        return own
    frozen = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(record.keys)
    return {name: tensor for name, tensor in own.items() if name not in frozen}


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    if not file.exists():
        raise UserError(f"{folder} holds no retrofit: it has no {SETTINGS}; write one with deepdelta.save_retrofit.")
    settings = read_object(file, "save the model anew")
    whole = isinstance(settings.get("options"), dict)
    if not whole or not TENSORS.fullmatch(str(settings.get("tensors"))):
        raise UserError(f"{file} must hold the options and the tensors' file name of a retrofit; save the model anew.")
    return settings


def _check(file: Path, tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise UserError(f"{file} does not fit this model: missing tensors {missing[:5]}, unknown {unknown[:5]}.")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{file} does not fit this model: '{name}' has shape {tuple(tensor.shape)} there and "
                f"{tuple(own[name].shape)} here."
            )

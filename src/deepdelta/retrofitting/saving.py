"""A retrofit in a folder: its options as JSON and its tensors as safetensors.

The JSON file names the tensors' file and is written last, so that who loads finds the old pair or the whole new one.
"""

import re
import secrets
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deepdelta.config import to_plain
from deepdelta.errors import UserError
from deepdelta.files import FORMAT, AnyPath, check_format, read_object, write_json
from deepdelta.provenance import versions
from deepdelta.retrofitting.core import Model, record_of, retrofit, undo_retrofit
from deepdelta.retrofitting.places import Place, places
from deepdelta.tensors import check_finite, load_tensors, save_tensors

SETTINGS = "retrofit.json"
TENSORS = re.compile(r"retrofit-[0-9a-f]{16}\.safetensors")


def save_retrofit(model: nn.Module, folder: AnyPath) -> None:
    """Write a retrofitted model's options and tensors to `folder`.

    With trainable='all' every tensor of the model is written, with 'residual' those that the retrofit added, those that
    are trained all the same, and the buffers, which training changes too (the statistics of batch norms): the other
    parameters are the plain model's. Names are those at the time of the retrofit, whatever is wrapped around parts of
    the model now (torch.compile, checkpointing); a parametrized tensor is written as what it computes to, and of an
    adapter by PEFT nothing, which saves itself.

    Raises:
        UserError: the model was not retrofitted, or does not hold the same tensors any more, or holds them on the
            device meta. The folder is then as it was.
    """
    record, folder = record_of(model), Path(folder)
    config = record.job.config
    kept = _kept(model, _all(model))
    name = f"retrofit-{secrets.token_hex(8)}.safetensors"
    save_tensors(folder / name, {tensor: place.value() for tensor, place in kept.items()})
    about = {"format": FORMAT, "versions": versions(), "families": record.families}
    write_json(folder / SETTINGS, about | {"options": to_plain(config), "tensors": name})
    for old in folder.glob("retrofit-*.safetensors"):
        if old.name != name and TENSORS.fullmatch(old.name):
            old.unlink()


def load_retrofit(model: Model, folder: AnyPath) -> Model:
    """Retrofit `model`, in place, with the options and the tensors that `save_retrofit` wrote to `folder`.

    Args:
        model: a plain model of the same architecture; for trainable='residual' with the weights that were retrofitted.

    Raises:
        UserError: no retrofit in the folder, a damaged one or one of another format, tensors that are missing in it or
            unknown to the model or of another shape, weights that are not finite, each named; or what `retrofit`
            raises. The model is then as it was.
    """
    folder = Path(folder)
    settings = _settings(folder)
    file = folder / settings["tensors"]
    tensors, _ = load_tensors(file, "restore a copy, or save the model anew")
    retrofit(model, **settings["options"])
    try:
        own = _all(model)
        needed = _kept(model, own)
        _check(file, tensors, needed, own)
    except BaseException:
        undo_retrofit(model)
        raise
    for name, tensor in tensors.items():
        own[name].fill(tensor)
        if name not in needed:
            own[name].train()
    return model


def _all(model: nn.Module) -> dict[str, Place]:
    """Every tensor of a retrofitted model, under the name that it had when it was retrofitted.

    Raises:
        UserError: one is not found any more, another has come, or one has no values.
    """
    record = record_of(model)
    found = places(model, record.names)
    missing, new = sorted(record.tensors - found.keys()), sorted(found.keys() - record.tensors)
    if missing or new:
        raise UserError(
            "the model must hold the tensors that it had when it was retrofitted: missing now are "
            f"{missing[:5]}, new are {new[:5]}; take off what was put in their place (pruning, sharding, new modules)."
        )
    if empty := [name for name, place in found.items() if place.value().is_meta]:
        raise UserError(
            f"the model must hold its values, and '{empty[0]}' is on the device meta; take off the hooks that offload "
            "it, or give it memory with .to_empty(device=...)."
        )
    return found


def _kept(model: nn.Module, found: dict[str, Place]) -> dict[str, Place]:
    """What is written of a retrofitted model."""
    record = record_of(model)
    if record.job.config.trainable == "all":
        return found
    return {name: place for name, place in found.items() if name in record.keys or place.is_buffer or place.trained}


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    if not file.exists():
        raise UserError(f"{folder} holds no retrofit: it has no {SETTINGS}; write one with deepdelta.save_retrofit.")
    settings = read_object(file, "save the model anew")
    check_format(settings, file)
    whole = isinstance(settings.get("options"), dict)
    if not whole or not TENSORS.fullmatch(str(settings.get("tensors"))):
        raise UserError(f"{file} must hold the options and the tensors' file name of a retrofit; save the model anew.")
    return settings


def _check(file: Path, tensors: dict[str, Tensor], needed: dict[str, Place], own: dict[str, Place]) -> None:
    missing, unknown = sorted(set(needed) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise UserError(f"{file} does not fit this model: missing tensors {missing[:5]}, unknown {unknown[:5]}.")
    for name, tensor in tensors.items():
        if not own[name].can_be_filled:
            raise UserError(
                f"{file} does not fit this model: '{name}' is computed by a parametrization without a right_inverse "
                "here; load first, then register it."
            )
        if tensor.shape != (shape := own[name].value().shape):
            raise UserError(
                f"{file} does not fit this model: '{name}' has shape {tuple(tensor.shape)} there and {tuple(shape)} "
                "here."
            )
    # Buffers may hold infinity, as masks do.
    check_finite({name: tensor for name, tensor in tensors.items() if not own[name].is_buffer}, file)

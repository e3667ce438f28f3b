"""Tensors in a file of ours: safetensors with a checksum, written whole or not at all, verified whenever it is read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.files import atomic_path, check_readable
from deepdelta.limits import check_memory

CHECKSUM = "sha256"
"""The key of the checksum among a file's metadata."""

Metadata = Mapping[str, str]


def save_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Metadata | None = None) -> str:
    """Write tensors by name, with text by key and a checksum of all of it, which is returned."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    held = dict(metadata or {})
    checksum = _checksum(contiguous, held)
    with atomic_path(target) as temporary:
        save_file(contiguous, temporary, metadata=held | {CHECKSUM: checksum})
    return checksum


def load_tensors(
    file: Path, mend: str, *, checksum: str | None = None, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the text that `save_tensors` wrote; the tensors are read from the file when they are used.

    Args:
        mend: what to do if the file is damaged, for the message.
        checksum: the one that the file must have, where that is known.
        verify: whether to hold what the file holds against its checksum, which reads all of it.

    Raises:
        UserError: no such file, one that cannot be read, a truncated one, or one that is not as it was written.
    """
    check_readable(file, f"{mend[:1].upper()}{mend[1:]}.")
    check_memory(file.stat().st_size, f"what {file} holds")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = dict(opened.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged ({error}); {mend}.") from None
    written = metadata.pop(CHECKSUM, None)
    if written is None:
        raise UserError(f"{file} holds no checksum: it is damaged, or nothing that this version wrote; {mend}.")
    if checksum not in (None, written):
        raise UserError(f"{file} is another than the one that was written here: its checksum differs; {mend}.")
    if verify and written != _checksum(tensors, metadata):
        raise UserError(f"{file} is damaged: what it holds does not have the checksum it was written with; {mend}.")
    return tensors, metadata


def check_finite(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse weights that no training leaves behind and that nothing can be computed with.

    Raises:
        UserError: naming `where` and the first tensor that holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where} must hold finite weights, but '{name}' holds NaN or infinity.")


def _checksum(tensors: Mapping[str, Tensor], metadata: Metadata) -> str:
    """SHA-256 of names, dtypes, shapes, metadata and, name by name, the tensors' bytes."""
    names = sorted(tensors)
    header = [[name, str(tensors[name].dtype), [*tensors[name].shape]] for name in names]
    sha = hashlib.sha256(json.dumps([header, sorted(metadata.items())]).encode())
    for name in names:
        sha.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()

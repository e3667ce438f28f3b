"""From a folder with a published checkpoint to a run directory that every other command takes."""

import struct
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError  # what torch raises for a file that holds more than tensors
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deepdelta.data import DataConfig, load_corpus
from deepdelta.errors import UserError
from deepdelta.files import check_folder, check_readable, read_object
from deepdelta.interop.published import load_published
from deepdelta.models import GPT
from deepdelta.training import RunDirectory, TrainConfig
from deepdelta.training.environment import versions
from deepdelta.training.loop import corpus_facts
from deepdelta.training.optimizer import build_optimizer

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt", "checkpoint.pt")
"""Names that a published checkpoint's tensors go by, in the order of preference."""

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


def import_published(folder: Path, run: Path, data: DataConfig | None) -> GPT:
    """Make `run` a run directory, at step 0, that holds the published model in `folder`.

    Args:
        folder: holds config.json and one of the files in `WEIGHTS`.
        run: a directory that holds no run yet.
        data: the corpus to evaluate the model on, kept as the run's own; None leaves it without one.

    Raises:
        UserError: see `read_published` and `load_published`; a run that exists; a corpus beyond the vocabulary or
            too short to evaluate on.
    """
    directory = RunDirectory(run)
    if directory.started:
        raise UserError(f"{run} already holds a run; give another --run directory.")
    check_folder(run, "--run")
    model = load_published(*read_published(folder))
    environment: dict[str, Any] = {"imported_from": str(folder), "versions": versions(), "corpus_sha256": None}
    corpus = None
    if data is not None:
        rows = model.embedding.weight.shape[0]
        # Bare ids come without a vocabulary: the model's own bounds it, and an id beyond is refused.
        data = replace(data, bin_vocab_size=min(data.bin_vocab_size, rows))
        corpus = load_corpus(data)
        if corpus.vocab_size > rows:
            raise UserError(f"the corpus has {corpus.vocab_size} ids, the imported model only {rows}.")
        if len(corpus.validation) < 2:
            raise UserError(f"{data.source} must hold out at least 2 tokens for validation, got 1; give more of it.")
        environment |= corpus_facts(corpus)
    config = TrainConfig(model=model.config, data=data or DataConfig())
    with directory.locked():
        if corpus is not None and corpus.tokenizer is not None:
            corpus.tokenizer.save(run)
        if model.unused_published:
            directory.save_unused(model.unused_published)
        directory.save_checkpoint(model, build_optimizer(model, config), step=0, seconds=0.0)
        directory.write_environment(environment)
        directory.write_config(config)
    return model


def read_published(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration keys and the tensors of a checkpoint folder; tensors only, no code of the file is run.

    Raises:
        UserError: a file is missing, damaged, or holds something other than tensors.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} must hold the model's config.json, but does not.")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"{folder} must hold the model's tensors as one of {', '.join(WEIGHTS)}, but does not.")
    keys = read_object(config, "restore the checkpoint's own")
    check_readable(weights, "Have it made readable for you.")
    try:
        if weights.suffix == ".safetensors":
            return keys, load_file(weights)
        # weights_only: the reader builds tensors and containers and refuses everything else.
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(
            f"{weights} holds more than tensors, which would mean running its code, or is damaged; save the model's "
            "state_dict alone, best as model.safetensors."
        ) from None
    except DAMAGED as error:
        raise UserError(f"{weights} does not hold a readable set of tensors: {error}") from None
    if not (
        isinstance(tensors, dict)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items())
    ):
        raise UserError(f"{weights} must hold a dictionary of tensors by name, and nothing else.")
    return keys, dict(tensors)

"""A run directory made of a published checkpoint."""

from dataclasses import replace
from typing import Any

from deepdelta.data import DataConfig, load_corpus
from deepdelta.errors import UserError
from deepdelta.files import AnyPath, check_folder
from deepdelta.interop.checkpoint import read_published
from deepdelta.interop.published import load_published
from deepdelta.models import GPT
from deepdelta.provenance import versions
from deepdelta.training.config import TrainConfig
from deepdelta.training.loop import corpus_facts
from deepdelta.training.optimizer import build_optimizer
from deepdelta.training.rundir import RunDirectory


def import_published(folder: AnyPath, run: AnyPath, data: DataConfig | None) -> GPT:
    """Make `run` a run directory, at step 0, that holds the published model in `folder`.

    Args:
        folder: holds config.json and one of the files in `WEIGHTS`, or one in `INDEXES` and the files that it lists.
        run: a directory that holds no run yet.
        data: the corpus to evaluate the model on, kept as the run's own; None leaves it without one.

    Raises:
        UserError: see `read_published` and `load_published`; a run that exists; a corpus beyond the vocabulary or
            too short to evaluate on.
    """
    directory = RunDirectory(run)
    if directory.started:
        raise UserError(f"{run} already holds a run; give another run directory.")
    directory.cut_short()
    check_folder(directory.path, "run directory")
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
        directory.clear()
        directory.save_checkpoint(model, build_optimizer(model, config), step=0, seconds=0.0)
        if corpus is not None and corpus.tokenizer is not None:
            corpus.tokenizer.save(directory.path)
        if model.unused_published:
            directory.save_unused(model.unused_published)
        directory.write_environment(environment)
        directory.write_config(config)
    return model

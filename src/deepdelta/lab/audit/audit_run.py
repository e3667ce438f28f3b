"""From a run directory, trained or imported, to the results of its audit."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt
from torch import Tensor

from deepdelta.data import Corpus, DataConfig, load_corpus, spread
from deepdelta.data.sources import list_source
from deepdelta.data.tokenizer import FILE_NAME
from deepdelta.device import choose_device
from deepdelta.errors import UserError, require
from deepdelta.files import AnyPath, check_folder
from deepdelta.lab.audit.audit import audit, passes
from deepdelta.lab.audit.findings import AuditResults
from deepdelta.limits import check_memory
from deepdelta.progress import reporting
from deepdelta.provenance import now, provenance
from deepdelta.training import RunDirectory, load
from deepdelta.training.checkpoints import CHECKPOINT
from deepdelta.training.loop import corpus_facts

BYTES = 256
MOST_IDS = 65536
"""How many ids a file of uint16 ids can tell apart."""


class Text(NamedTuple):
    """What an audit reads: the run's own corpus, or another text."""

    source: str | None = None
    """A file, a folder or a `.bin` file of ids; None: the run's own corpus."""
    tokenizer: str | None = None
    """'bytes' or a `tokenizers` JSON file, for a source and a run that keeps no tokenizer."""


def audit_run(
    run: AnyPath,
    text: Text,
    out: AnyPath,
    *,
    tokens: int,
    sample: int,
    batch_size: int,
    device: str,
    command: str,
    checkpoint: str = CHECKPOINT,
    say: Callable[[str], None] = lambda _: None,
) -> AuditResults:
    """Audit the model of a run on held-out text, showing progress, and write `out`/audit.json.

    Args:
        tokens: how much of the text's held-out part is read, rounded down to whole windows of the model's context.
        sample, batch_size: see `audit`.
        command: the command that was typed, kept with the results.
        checkpoint: which of the run's, as `load` takes it.
        say: takes a line before each slow step of reading the text.

    Raises:
        UserError: no run; no text, or one that cannot be put into the model's ids or is too short; `out` cannot be
            written; the extra `lab` is absent; see also `audit`.
    """
    started = now()
    require("audits", "lab", "scipy", "jinja2", "plotly")
    directory = RunDirectory(run)
    config = directory.config()
    out = Path(out)
    check_folder(out)
    chosen = choose_device(device, "fp32")
    corpus = _corpus(directory, text, say)
    windows = spread_windows(corpus.validation, config.model.context, tokens)
    corpus.check_unchanged()
    model = load(run, checkpoint).model.to(chosen.device)
    count, context = windows.shape[0], config.model.context
    logits = min(batch_size, count) * context * model.embedding.weight.shape[0]
    check_memory(8 * logits, "the logits of a batch and their logarithms (batch_size times context)", chosen.device)
    total = count * passes(config.model.residual, len(model.residuals()))
    with reporting(f"Auditing {run}", total) as reporter:
        findings = audit(model, windows, sample=sample, batch_size=batch_size, progress=reporter.update)
    results = AuditResults(
        run=str(run),
        step=directory.checkpoint(checkpoint).step,
        model=config.model,
        corpus=corpus.description,
        corpus_sha256=corpus.sha256,
        contexts=f"{count:,} windows of {context:,} tokens, evenly spread over the held-out part",
        **provenance(command),
        device=str(chosen.device),
        started=started,
        finished=now(),
        findings=findings,
    )
    results.save(out / "audit.json")
    return results


def spread_windows(split: UInt[np.ndarray, " tokens"], context: int, tokens: int) -> Int64[Tensor, "windows context1"]:
    """Whole windows of `context` inputs and the label after them, evenly spread, without overlap of their inputs.

    Raises:
        UserError: the split holds no whole window, or `tokens` is less than one.
    """
    there = (len(split) - 1) // context
    if there < 1:
        raise UserError(
            f"the held-out part must hold more tokens than the model's context of {context:,}, it has {len(split):,}; "
            "give more text by --source."
        )
    if tokens < context:
        raise UserError(f"tokens must be at least the model's context of {context:,}, for one window; got {tokens:,}.")
    return spread(split, context=context, limit=tokens)


def _corpus(directory: RunDirectory, text: Text, say: Callable[[str], None]) -> Corpus:
    if text.source is not None:
        return _other_corpus(directory, text.source, text.tokenizer, say)
    if text.tokenizer is not None:
        raise UserError("--tokenizer belongs to the text of --source; give that too, or leave it out.")
    if directory.environment()["corpus_sha256"] is None:
        raise UserError(f"{directory.path} was imported without a corpus; give the text to audit it on by --source.")
    corpus = load_corpus(directory.config().data, progress=say)
    directory.check_environment(corpus_facts(corpus), exact=False)
    return corpus


def _other_corpus(directory: RunDirectory, source: str, tokenizer: str | None, say: Callable[[str], None]) -> Corpus:
    """The text that `source` names in the ids of the run's model."""
    run, rows = directory.path, directory.config().model.vocab_size
    assert rows is not None, "a run's configuration is resolved"
    kept = directory.tokenizer() is not None
    if kept and tokenizer is not None:
        raise UserError(f"{run} keeps the tokenizer of its model; leave --tokenizer out.")
    data = DataConfig(
        source=source,
        tokenizer=str(run / FILE_NAME) if kept else tokenizer or "bytes",
        bin_vocab_size=min(rows, MOST_IDS),
    )
    if not (kept or tokenizer or rows == BYTES or list_source(data).ids):
        raise UserError(
            f"{run} keeps no tokenizer, so text cannot be turned into the {rows:,} ids of its model: give the model's "
            "`tokenizers` JSON file by --tokenizer, or ids instead of text (a .bin file) by --source."
        )
    if data.tokenizer == "bpe":
        raise UserError(
            "--tokenizer must be the one that the model was trained with, not a new BPE; give its JSON file."
        )
    corpus = load_corpus(data, progress=say)
    if corpus.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {corpus.vocab_size:,} ids, the model of {run} only {rows:,}; give the one that the "
            "model was trained with by --tokenizer."
        )
    return corpus

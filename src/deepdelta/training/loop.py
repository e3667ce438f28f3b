"""From a configuration to a run directory: what must hold before the first step, and what is written then."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from deepdelta.config import to_plain
from deepdelta.data import Corpus, check_context, load_corpus
from deepdelta.device import Device, choose_device, compiler_problem, keep_freed_memory
from deepdelta.errors import UserError
from deepdelta.files import AnyPath, check_folder
from deepdelta.limits import check_memory
from deepdelta.models import GPT, LanguageModel, language_model, least_bytes, logits_at_once, parameter_count
from deepdelta.nn import use_backend, use_memory
from deepdelta.nn.backend import Chosen
from deepdelta.nn.runtime import backend_taken
from deepdelta.progress import show
from deepdelta.provenance import commit, machine, versions
from deepdelta.training.config import TrainConfig
from deepdelta.training.optimizer import rate_change
from deepdelta.training.parallel import check_parallel, claim_device, fill, recompute
from deepdelta.training.ranks import TIMEOUT, Ranks, together
from deepdelta.training.rundir import ONE_PROCESS, RunDirectory
from deepdelta.training.trainer import Say, Trained, Trainer


def train(
    config: TrainConfig,
    path: AnyPath,
    *,
    init_from: AnyPath | None = None,
    inexact_resume: bool = False,
    say: Say = show,
    on_row: Callable[[Mapping[str, Any]], None] | None = None,
    timeout: float = TIMEOUT,
) -> Trained:
    """Start the run in `path`, or continue the one that is there.

    Args:
        config: what to train; a run that is there must have been started with the same, but may get more steps.
        path: the run directory.
        init_from: a run whose weights a new run starts from; where they are those of a plain model and the new one has
            `plain_start`, it is retrofitted: the function is the run's, and what delta residuals add has its own start.
        inexact_resume: continue even where versions, machine, threads or device differ from the run's.
        say: takes the lines meant for the user.
        on_row: takes every row of `metrics.jsonl` once it is written.
        timeout: seconds that the processes of a run wait for each other, where torchrun has started several; the first
            of them alone writes, and calls `say` and `on_row`.

    Raises:
        UserError: anything the user must mend; the run directory is then as it was. `not_finite` steps in a row whose
            loss or gradient is not finite, or such a validation loss, stop the run and leave the last good checkpoint.
    """
    with together(timeout) as ranks:
        return _train(config, RunDirectory(path), init_from, inexact_resume, say, on_row, ranks)


def _train(
    config: TrainConfig,
    run: RunDirectory,
    init_from: AnyPath | None,
    inexact_resume: bool,
    say: Say,
    on_row: Callable[[Mapping[str, Any]], None] | None,
    ranks: Ranks,
) -> Trained:
    given = {"run": str(run.path), "init_from": init_from and str(init_from), "inexact_resume": inexact_resume}
    if init_from is not None and config.init_offset:
        raise UserError(
            f"init_offset changes initial weights, and these come from {init_from}: leave init_offset or init_from out."
        )
    ranks.agree(given | to_plain(config))
    check_parallel(config, ranks)
    ranks.sharing = 1 if config.parallel == "tensor" else ranks.size
    ranks.shared(lambda: _check_place(run))
    say = say if ranks.first else lambda line: None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    chosen = choose_device(config.device, config.precision)
    if config.compile and (problem := compiler_problem(chosen.device.type)):
        raise UserError(f"{problem}; or train with compile=False.")
    claim_device(chosen, ranks)
    threads = torch.get_num_threads()
    keep_freed_memory()
    say(f"Device {chosen.device} ({chosen.reason}), precision {chosen.precision}, CPU threads: {threads}.")
    if ranks.started_together:
        rows = config.batch_size // ranks.sharing
        say(f"{ranks.size} processes by {config.parallel}, of each batch {rows} rows each.")
    corpus = load_corpus(config.data, progress=say)
    check_context(corpus, config.model.context)
    config = resolve(config, corpus)
    say(corpus.description)
    sharded = ranks.started_together and config.parallel != "ddp"
    check_size(config, chosen, ranks.sharing, ranks.size if sharded else 1)
    model = language_model(config.model, config.seed + config.init_offset)
    if not sharded:  # or its layers, one by one
        model.to(chosen.device)
    if (source := None if init_from is None else RunDirectory(init_from)) is not None:
        ranks.shared(lambda: start_from(source, model))
        weights = model.state_dict()
        fill(weights, weights.__getitem__, ranks)
    rewrites = set_runtime(model, config)
    if config.warning:
        say(config.warning)
    say(f"Rewrites by the backend '{rewrites.backend}' ({rewrites.reason}).")
    environment = describe(chosen, corpus) | {"backend": rewrites.backend}
    ranks.agree({key: value for key, value in environment.items() if key not in ("machine", "commit", "threads")})
    environment |= {"processes": ranks.size, "parallel": config.parallel} if ranks.started_together else ONE_PROCESS
    trainer = Trainer(config, run, corpus, chosen, model, say, on_row, ranks)
    with run.locked() if ranks.first else nullcontext(), trainer.saver:
        if ranks.shared(lambda: run.started):
            ranks.shared(lambda: _check_continues(run, config, environment, init_from, inexact_resume))
            trainer.restore()
            if ranks.first and (change := rate_change(run.config(), config, trainer.step)):
                say(change)
        else:
            ranks.shared(run.clear)
            # Written first: a checkpoint at step 0 tells what a start cut short has left from the files of a user.
            trainer.save(at_once=True)
            start = {"init_from": None} if source is None else _describe_start(source)
            ranks.shared(lambda: _write_start(run, corpus, environment | start))
        # Written last: it makes the directory a run, or gives the run its new number of steps.
        ranks.shared(lambda: run.write_config(config))
        return trainer.run_steps()


def _check_place(run: RunDirectory) -> None:
    """Refuse, before the work, a place that cannot be a run directory."""
    if not run.started:
        run.cut_short()
    check_folder(run.path, "run directory")


def _write_start(run: RunDirectory, corpus: Corpus, environment: dict[str, Any]) -> None:
    if corpus.tokenizer is not None:
        corpus.tokenizer.save(run.path)
    run.write_environment(environment)


def check_size(config: TrainConfig, chosen: Device, processes: int = 1, shards: int = 1) -> None:
    """Refuse a run that no step of can fit into memory, before its model is made.

    Counted are weights, gradients and AdamW's two moments, of a micro-batch the logits with their gradient, and of a
    batch its ids and labels: what every step needs. On a CPU the copy that a checkpoint is written from comes on top.
    Of several processes each has its rows of a micro-batch, and of a model in shards its share.

    Raises:
        UserError: the model, its training state or a batch is too large for the machine or its device.
    """
    assert config.model.vocab_size is not None, "the configuration is resolved"
    check_memory(least_bytes(config.model), "the model")
    check_memory(16 * config.tokens_per_step, "a batch (batch_size times accumulate times context)")
    tokens = config.batch_size // processes * config.model.context
    logits = logits_at_once(tokens, config.model.vocab_size)
    state = (least_bytes(config.model) + 12 * parameter_count(config.model)) // shards
    least = state + 8 * logits + 2 * tokens * config.model.dim
    check_memory(least, "a training step (the model's size, batch_size times context)", chosen.device)
    if config.async_save and chosen.device.type == "cpu":
        copy = 12 * parameter_count(config.model) // shards
        check_memory(least + copy, "a training step and the copy of a checkpoint (which async_save=False leaves out)")


def set_runtime(model: LanguageModel, config: TrainConfig) -> Chosen:
    """Let the model run as the settings say; what does its rewrites."""
    if not isinstance(model, GPT):
        return Chosen("reference", f"the rival '{model.config.rival}' is plain PyTorch")
    if config.recompute:
        recompute(model)
    use_memory(model, config.memory)
    use_backend(model, config.backend)
    return backend_taken(model, config.batch_size * config.model.context, compiled=config.compile)


def start_from(run: RunDirectory, model: LanguageModel) -> None:
    """Load a run's weights into a new model: of the same settings, or the retrofit of the run's plain one.

    Raises:
        UserError: the weights do not fit.
    """
    absent: set[str] = set()
    if isinstance(model, GPT) and model.config.residual.plain_start:
        there = run.config().model.residual
        if (there.rule, there.value_channels) == ("additive", 1):
            kept = [part for residual in model.residuals() for part in (residual.branch, residual.norm) if part]
            plain = {parameter for part in (model.embedding, model.norm, *kept) for parameter in part.parameters()}
            absent = {name for name, parameter in model.named_parameters() if parameter not in plain}
    run.load_weights(model, absent)


def _describe_start(run: RunDirectory) -> dict[str, Any]:
    """Where a new run's weights come from, and how they were trained."""
    return {"init_from": str(run.path), "init_config": to_plain(run.config())}


def _check_continues(
    run: RunDirectory, config: TrainConfig, environment: dict[str, Any], init_from: AnyPath | None, inexact: bool
) -> None:
    there = run.environment().get("init_from")
    if init_from is not None and str(init_from) != there:
        raise UserError(
            f"{run.path} already holds a run, started from {there or 'new weights'}; --init-from {init_from} starts a "
            "new one: give another run directory."
        )
    run.check_continues(config)
    run.check_environment(environment, exact=not inexact)


def resolve(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    """The configuration with the vocabulary filled in from the corpus, and the learning rate from the residual."""
    size = config.model.vocab_size
    if size is not None and size < corpus.vocab_size:
        raise UserError(f"model.vocab_size must be at least the corpus's {corpus.vocab_size}, got {size}.")
    return replace(config, lr=config.rate, model=replace(config.model, vocab_size=size or corpus.vocab_size))


def describe(chosen: Device, corpus: Corpus) -> dict[str, Any]:
    """What a run's numbers depend on besides its configuration."""
    return {
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
        "device": chosen.device.type,
        "precision": chosen.precision,
        "threads": torch.get_num_threads(),
        **corpus_facts(corpus),
    }


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """What tells whether two runs saw the same ids."""
    return {
        "corpus": corpus.description,
        "corpus_sha256": corpus.sha256,
        "tokenizer_sha256": corpus.tokenizer.sha256 if corpus.tokenizer else None,
        "validation_bytes": corpus.validation_bytes,
        **({"shards": dict(corpus.shards)} if corpus.shards else {}),
    }

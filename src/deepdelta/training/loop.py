"""The training loop: from a configuration to a run directory.

A step is a pure function of (weights, optimiser state, seed, step), so a run continues from its checkpoint bit for
bit: no generator or loader has a state of its own.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepdelta.config import to_plain
from deepdelta.data import Corpus, batch, check_context, load_corpus
from deepdelta.device import Device, choose_device, compiler_problem, keep_freed_memory
from deepdelta.errors import UserError
from deepdelta.files import AnyPath, check_folder
from deepdelta.limits import check_memory
from deepdelta.models import GPT, LanguageModel, language_model, least_bytes, parameter_count
from deepdelta.nn import use_backend, use_memory
from deepdelta.nn.backend import Chosen
from deepdelta.nn.runtime import backend_taken
from deepdelta.progress import Reporter, duration, reporting, show
from deepdelta.provenance import commit, machine, versions
from deepdelta.training.config import TrainConfig
from deepdelta.training.evaluation import evaluate
from deepdelta.training.metrics import append_json
from deepdelta.training.optimizer import build_optimizer, learning_rate, rate_change
from deepdelta.training.rundir import RunDirectory
from deepdelta.training.step import micro_losses, training_step

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """How a call of `train` ended."""

    step: int
    finished: bool
    """False where a signal stopped it; the checkpoint holds the last step."""
    validation_loss: float | None
    """Nats per token after the last step; None where the run has not finished."""


def train(
    config: TrainConfig,
    path: AnyPath,
    *,
    init_from: AnyPath | None = None,
    inexact_resume: bool = False,
    say: Say = show,
) -> Trained:
    """Start the run in `path`, or continue the one that is there.

    Args:
        config: what to train; a run that is there must have been started with the same, but may get more steps.
        path: the run directory.
        init_from: a run whose weights a new run starts from; where they are those of a plain model and the new one has
            `plain_start`, it is retrofitted: the function is the run's, and what delta residuals add has its own start.
        inexact_resume: continue even where versions, machine, threads or device differ from the run's.
        say: takes the lines meant for the user.

    Raises:
        UserError: anything the user must mend; the run directory is then as it was. A loss that is not finite stops
            the run at its step and leaves the last good checkpoint.
    """
    run = RunDirectory(path)
    if not run.started:
        run.cut_short()  # refused before the work, if at all
    check_folder(run.path, "--run")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    chosen = choose_device(config.device, config.precision)
    if config.compile and (problem := compiler_problem(chosen.device.type)):
        raise UserError(f"{problem}; or train with compile=False.")
    threads = torch.get_num_threads()
    keep_freed_memory()
    say(f"Device {chosen.device} ({chosen.reason}), precision {chosen.precision}, CPU threads: {threads}.")
    corpus = load_corpus(config.data, progress=say)
    check_context(corpus, config.model.context)
    config = resolve(config, corpus)
    say(corpus.description)
    check_size(config, chosen)
    model = language_model(config.model, config.seed).to(chosen.device)
    if init_from is not None:
        start_from(RunDirectory(init_from), model)
    rewrites = set_runtime(model, config)
    if config.warning:
        say(config.warning)
    say(f"Rewrites by the backend '{rewrites.backend}' ({rewrites.reason}).")
    environment = describe(chosen, corpus) | {"backend": rewrites.backend}
    trainer = Trainer(config, run, corpus, chosen, model, say)
    with run.locked():
        if run.started:
            _check_continues(run, config, environment, init_from, inexact_resume)
            trainer.restore()
            if change := rate_change(run.config(), config, trainer.step):
                say(change)
        else:
            run.clear()
            # Written first: a checkpoint at step 0 tells what a start cut short has left from the files of a user.
            trainer.save()
            if corpus.tokenizer is not None:
                corpus.tokenizer.save(run.path)
            start = {"init_from": None} if init_from is None else _describe_start(RunDirectory(init_from))
            run.write_environment(environment | start)
        # Written last: it makes the directory a run, or gives the run its new number of steps.
        run.write_config(config)
        return trainer.run_steps()


def check_size(config: TrainConfig, chosen: Device) -> None:
    """Refuse a run that no step of can fit into memory, before its model is made.

    Counted are weights, gradients and AdamW's two moments, of a micro-batch the logits with their gradient, and of a
    batch its ids and labels: what every step needs.

    Raises:
        UserError: the model, its training state or a batch is too large for the machine or its device.
    """
    assert config.model.vocab_size is not None, "the configuration is resolved"
    check_memory(least_bytes(config.model), "the model")
    check_memory(16 * config.tokens_per_step, "a batch (batch_size times accumulate times context)")
    logits = config.batch_size * config.model.context * config.model.vocab_size
    state = least_bytes(config.model) + 12 * parameter_count(config.model)
    check_memory(state + 8 * logits, "a training step (the model's size, batch_size times context)", chosen.device)


def set_runtime(model: LanguageModel, config: TrainConfig) -> Chosen:
    """Let the model run as the settings say; what does its rewrites."""
    if not isinstance(model, GPT):
        return Chosen("reference", f"the rival '{model.config.rival}' is plain PyTorch")
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
            "new one: give another --run directory."
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
    }


class Trainer:
    """One run from its last checkpoint to its last step."""

    def __init__(
        self, config: TrainConfig, run: RunDirectory, corpus: Corpus, chosen: Device, model: LanguageModel, say: Say
    ) -> None:
        self.config, self.run, self.corpus, self.chosen, self.model, self.say = config, run, corpus, chosen, model, say
        self.optimizer = build_optimizer(model, config)
        self.step, self.seconds = 0, 0.0
        self.saved: int | None = None
        """The step of the last good checkpoint."""
        self.forward: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]

    def run_steps(self) -> Trained:
        config = self.config
        validation_loss = self._recorded_validation()
        if self.step >= config.steps and validation_loss is not None:
            self.say(f"{self.run.path} has all its {config.steps} steps; give more --steps to extend it.")
            return Trained(self.step, True, validation_loss)
        with stop_signals() as stopped, reporting(str(self.run.path), config.steps, self.step) as reporter:
            while self.step < config.steps and not stopped():
                self._one_step(reporter)
                last = self.step == config.steps
                if last or self.step % config.eval_every == 0:
                    self._validate(config.eval_tokens, reporter, final=False)
                if last or stopped() or self.step % config.checkpoint_every == 0:
                    self.corpus.check_unchanged()
                    self._check_good()
                    self.save()
            if self.step < config.steps:
                self.say(f"Stopped at step {self.step} of {config.steps}, saved. The same command continues.")
                return Trained(self.step, False, None)
            validation_loss = self._validate(config.final_eval_tokens, reporter, final=True)
        self.say(
            f"Finished {config.steps} steps in {duration(self.seconds)}: validation loss {validation_loss:.4f} nats "
            "per token."
        )
        return Trained(self.step, True, validation_loss)

    def restore(self) -> None:
        """Go back to the run's last checkpoint, and cut its metrics back to that step.

        Raises:
            UserError: the checkpoint or the metrics are damaged, or it is beyond the last step.
        """
        self.step, self.seconds = self.run.restore(self.model, self.optimizer)
        self.saved = self.step
        if self.step > self.config.steps:
            raise UserError(
                f"{self.run.path} is at step {self.step} already; steps={self.config.steps} must not be fewer."
            )
        self.run.cut_metrics(self.step)
        self.say(f"Continuing {self.run.path} at step {self.step} of {self.config.steps}.")

    def save(self) -> None:
        with self._naming_the_last_good():
            self.run.save_checkpoint(self.model, self.optimizer, self.step, self.seconds)
        self.saved = self.step

    def _record(self, row: dict[str, Any]) -> None:
        with self._naming_the_last_good():
            append_json(self.run.metrics_path, row)

    @contextmanager
    def _naming_the_last_good(self) -> Iterator[None]:
        """What stops the writing, a full disk say, as the user's to mend, with the step that the run goes on from."""
        try:
            yield
        except UserError as error:
            if self.saved is None:
                raise
            raise UserError(f"{error} {self._last_good} Once that is mended, the same command continues.") from error

    @property
    def _last_good(self) -> str:
        return f"The last good checkpoint is at step {self.saved} in {self.run.path}."

    def _one_step(self, reporter: Reporter) -> None:
        config, began = self.config, time.perf_counter()
        rate = learning_rate(config, self.step)
        losses = self._losses(self.forward)
        loss, norm = training_step(self.model, self.optimizer, losses, clip=config.clip, rate=rate)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(f"the loss is {loss} and the gradient norm {norm} at step {self.step + 1}")
        self.step += 1
        spent = time.perf_counter() - began
        self.seconds += spent
        row = {"step": self.step, "loss": loss, "lr": rate, "gradient_norm": norm, "seconds": round(self.seconds, 4)}
        self._record(row)
        reporter.update(self.step, f"loss {loss:.3f}  {config.tokens_per_step / spent:,.0f} tokens/s")

    def _losses(self, forward: nn.Module) -> Iterator[Tensor]:
        """The share of each micro-batch in the loss of the next step."""
        config = self.config
        self.corpus.check_mapped()
        inputs, labels = batch(
            self.corpus.train,
            seed=config.seed,
            step=self.step,
            rank=0,
            batch_size=config.batch_size * config.accumulate,
            context=config.model.context,
        )
        return micro_losses(forward, inputs, labels, config.accumulate, self.chosen)

    @torch.no_grad()
    def _check_good(self) -> None:
        """Only weights with which the next step has a finite loss may replace the last good checkpoint."""
        loss = next(self._losses(self.model)).item()
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} at step {self.step + 1}")

    def _diverged(self, what: str) -> UserError:
        self._record({"step": self.step + 1, "diverged": True})
        return UserError(
            f"{what}: training diverged. {self._last_good} "
            f"Lower lr (now {self.config.rate:g}) or clip, or lengthen warmup."
        )

    def _validate(self, tokens: int | None, reporter: Reporter, *, final: bool) -> float:
        result = evaluate(
            self.model,
            self.corpus,
            batch_size=self.config.batch_size,
            device=self.chosen.device,
            autocast=self.chosen.precision == "bf16",
            tokens=tokens,
        )
        if not math.isfinite(result.loss):
            raise self._diverged(f"the validation loss is {result.loss} after step {self.step}")
        row = {
            "step": self.step,
            "validation_loss": result.loss,
            "validation_tokens": result.tokens,
            "final": final,
            "seconds": round(self.seconds, 4),
        }
        self._record(row)
        reporter.note(f"step {self.step}: validation loss {result.loss:.4f} on {result.tokens:,} tokens")
        return result.loss

    def _recorded_validation(self) -> float | None:
        """The final validation at the present step, where the run has made it already."""
        rows = [row for row in self.run.metrics() if row.get("final") and row["step"] == self.step]
        return rows[-1]["validation_loss"] if rows else None


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has arrived: the step in progress is finished all the same; a second one interrupts."""
    arrived = threading.Event()

    def note(number: int, frame: object) -> None:
        if arrived.is_set():
            raise KeyboardInterrupt
        arrived.set()

    if threading.current_thread() is not threading.main_thread():
        yield arrived.is_set
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

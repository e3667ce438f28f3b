"""One run from its last checkpoint to its last step.

A step is a pure function of (weights, optimiser state, seed, step), so a run continues from its checkpoint bit for
bit: no generator or loader has a state of its own.
"""

import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from deepdelta.data import Corpus, windows
from deepdelta.device import Device
from deepdelta.errors import UserError
from deepdelta.models import LanguageModel
from deepdelta.progress import Reporter, duration, reporting
from deepdelta.training.averaging import averaged, begin_anew, follow
from deepdelta.training.checkpoints import AVERAGE, BEST, CHECKPOINT, restore
from deepdelta.training.config import TrainConfig
from deepdelta.training.evaluation import Evaluation, evaluate
from deepdelta.training.health import Health, first_not_finite, health
from deepdelta.training.metrics import append_json, is_step
from deepdelta.training.optimizer import build_optimizer, learning_rate
from deepdelta.training.parallel import distributed
from deepdelta.training.prefetch import Prefetched
from deepdelta.training.ranks import ALONE, Ranks
from deepdelta.training.rundir import RunDirectory
from deepdelta.training.saving import Saver
from deepdelta.training.step import Made, micro_losses, step_batch, step_repeats, training_step

Say = Callable[[str], None]

READ_EVERY = 16
"""Steps on an accelerator whose numbers are read together, since whoever reads waits for the device."""


@dataclass(frozen=True)
class Trained:
    """How a call of `train` ended."""

    step: int
    finished: bool
    """False where a signal stopped it; the checkpoint holds the last step."""
    validation_loss: float | None
    """Nats per token after the last step; None where the run has not finished."""


class _Unread(NamedTuple):
    """A step whose numbers are still on the device."""

    step: int
    rate: float
    made: Made


class Trainer:
    """One run from its last checkpoint to its last step."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        corpus: Corpus,
        chosen: Device,
        model: LanguageModel,
        say: Say,
        on_row: Callable[[Mapping[str, Any]], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.on_row, self.ranks = on_row, ranks
        self.config, self.run, self.corpus, self.chosen, self.model, self.say = config, run, corpus, chosen, model, say
        self.average = averaged(model, config)
        shared = distributed(model, [self.average.module] if self.average else [], config, chosen, ranks)
        self.optimizer = build_optimizer(model, config)
        self.step, self.seconds = 0, 0.0
        self.unread: list[_Unread] = []
        self.read_every = 1 if chosen.device.type == "cpu" else READ_EVERY
        self.began = 0.0
        """When the first of them began."""
        self.best = math.inf
        """The lowest validation loss so far."""
        self.skipped, self.in_a_row = 0, 0
        """Steps whose loss or gradient was not finite: of the run, and after the last that was."""
        self.warned = False
        self.saver = Saver(run, ranks, beside=config.async_save)
        # On a CPU a batch takes a thousandth of a step, and a thread would take a core from it.
        ahead = chosen.device.type != "cpu"
        self.batches = Prefetched(self._batch, pinned=chosen.device.type == "cuda") if ahead else self._batch
        self.forward: nn.Module = torch.compile(shared) if config.compile else shared  # type: ignore[assignment]

    def run_steps(self) -> Trained:
        config = self.config
        validation_loss = self._recorded_validation()
        if self.step >= config.steps and validation_loss is not None:
            self.say(f"{self.run.path} has all its {config.steps} steps; give more --steps to extend it.")
            return Trained(self.step, True, validation_loss)
        console = None if self.ranks.first else Console(file=io.StringIO())
        with stop_signals() as stopped, reporting(str(self.run.path), config.steps, self.step, console) as reporter:
            stop = self.ranks.any(stopped())
            while self.step < config.steps and not stop:
                self._one_step()
                last = self.step == config.steps
                validates, saves = last or self.step % config.eval_every == 0, self.step % config.checkpoint_every == 0
                reads = validates or saves or len(self.unread) == self.read_every
                if reads:
                    self._read(reporter)
                # Several ranks stop after the same step, so they ask each other, where they have waited in any case.
                if (reads or self.ranks.size == 1) and (stop := self.ranks.any(stopped() or self.ranks.orphaned)):
                    self._read(reporter)
                if validates:
                    self._validate(config.eval_tokens, reporter, final=False)
                if last or stop or saves:
                    self.corpus.check_unchanged()
                    # A step whose loss is not finite would be no place to go on from; the last one was validated.
                    if last or self._next_is_finite():
                        self.save()
            if self.step < config.steps:
                self._settle()
                there = self.saver.saved
                saved = "saved" if there == self.step else f"saved at step {there}"
                self.say(f"Stopped at step {self.step} of {config.steps}, {saved}. The same command continues.")
                return Trained(self.step, False, None)
            if self.average is not None:
                self._save(self.average.module, None, None, AVERAGE)
            self._settle()  # before the line of metrics that says that nothing is left to be done
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
        run, ranks = self.run, self.ranks
        self.step, self.seconds = restore(run.path, self.model, self.optimizer, self.average, self.say, ranks)
        self.saver.saved = self.step
        if self.step > self.config.steps:
            raise UserError(
                f"{self.run.path} is at step {self.step} already; steps={self.config.steps} must not be fewer."
            )
        ranks.shared(lambda: run.cut_metrics(self.step))
        # A kill may have come between the checkpoint and its name among those that are kept.
        ranks.shared(lambda: run.keep_checkpoints(self.step, self.config.keep_last))
        if self.average is not None:
            begin_anew(self.average, self.config, self.step)
        self.skipped, self.in_a_row, self.best = ranks.shared(self._recorded)
        self.say(f"Continuing {self.run.path} at step {self.step} of {self.config.steps}.")

    def _recorded(self) -> tuple[int, int, float]:
        """Skipped steps so far and in a row, and the best validation loss."""
        skipped, in_a_row, best = 0, 0, math.inf
        for row in self.run.metrics():
            if is_step(row):
                skipped, in_a_row = row.get("skipped", skipped), in_a_row + 1 if "skipped" in row else 0
            elif not row["final"]:
                best = min(best, row["validation_loss"])
        return skipped, in_a_row, best

    def save(self, *, at_once: bool = False) -> None:
        """Begin to write the run's last checkpoint; `at_once`, it is there when this returns."""
        self._save(self.model, self.optimizer, self.average, CHECKPOINT)
        if at_once:
            self._settle()

    def _save(self, model: nn.Module, optimizer: Optimizer | None, average: AveragedModel | None, name: str) -> None:
        with self._naming_the_last_good():
            self.saver.save(model, optimizer, average, self.step, self.seconds, name, self.config.keep_last)

    def _settle(self) -> None:
        with self._naming_the_last_good():
            self.saver.settle()

    def _record(self, row: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        with self._naming_the_last_good():
            append_json(self.run.metrics_path, row)
        if self.on_row is not None:
            self.on_row(row)

    @contextmanager
    def _naming_the_last_good(self) -> Iterator[None]:
        """What stops the writing, a full disk say, as the user's to mend, with the step that the run goes on from."""
        try:
            yield
        except UserError as error:
            if self.saver.saved is None:
                raise
            raise UserError(f"{error} {self._last_good} Once that is mended, the same command continues.") from error

    @property
    def _last_good(self) -> str:
        return f"The last good checkpoint is at step {self.saver.saved} in {self.run.path}."

    def _one_step(self) -> None:
        config = self.config
        if not self.unread:
            self.began = time.perf_counter()
        rate, losses = learning_rate(config, self.step), self._losses(self.forward, self.step)
        made = training_step(self.model, self.optimizer, losses, clip=config.clip, rate=rate, ranks=self.ranks)
        self.step += 1
        follow(self.average, self.model, config, self.step)
        self.unread.append(_Unread(self.step, rate, made))

    def _read(self, reporter: Reporter) -> None:
        """Record the steps whose numbers have not been read."""
        if not self.unread:
            return
        found = [(step, rate, *made.read()) for step, rate, made in self.unread]
        self.unread.clear()
        spent = time.perf_counter() - self.began
        self.seconds += spent
        for step, rate, loss, norm in found:
            if math.isfinite(loss) and math.isfinite(norm):
                self.in_a_row, numbers = 0, {"loss": loss, "lr": rate, "gradient_norm": norm}
            else:
                self._skip(step, f"the loss is {loss} and the gradient norm {norm}", reporter)
                numbers = {"skipped": self.skipped, "lr": rate}
            self._record({"step": step, **numbers, "seconds": round(self.seconds, 4)})
        pace = len(found) * self.config.tokens_per_step / spent
        said = "skipped" if self.in_a_row else f"loss {loss:.3f}"
        reporter.update(self.step, f"{said}  {pace:,.0f} tokens/s")

    def _skip(self, step: int, what: str, reporter: Reporter) -> None:
        """Count a step that changed nothing; stop at the last of `not_finite` in a row."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row < self.config.not_finite:
            reporter.note(f"step {step}: {what}; skipped, the weights stay as they are")
            return
        found = first_not_finite(self.model, lambda: list(self._losses(self.model, step - 1)))
        every, names = self.ranks.gathered(found), [name for name, _ in self.model.named_modules()]
        name = min(filter(None, every), key=names.index, default=None)
        layer = f"the first layer whose output is not finite is '{name}'" if name else "every layer's output is finite"
        row = f", {self.in_a_row} such steps in a row" if self.in_a_row > 1 else ""
        raise self._diverged(f"{what} at step {step}{row} ({layer})", step)

    def _losses(self, forward: nn.Module, step: int) -> Iterator[Tensor]:
        """The share of each micro-batch in the loss of the step after `step`."""
        config = self.config
        inputs, labels = self.batches(step)
        repeats = step_repeats(config, step)
        return micro_losses(forward, inputs, labels, config.accumulate, self.chosen, self.ranks, repeats)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.corpus.check_mapped()
        return step_batch(self.config, self.corpus, step)

    @torch.no_grad()
    def _next_is_finite(self) -> bool:
        """Whether the next step has a finite loss: only weights with which it has may replace the last good ones."""
        return not self.ranks.any(not math.isfinite(next(self._losses(self.model, self.step)).item()))

    def _diverged(self, what: str, step: int) -> UserError:
        self._settle()
        self._record({"step": step, "diverged": True})
        return UserError(
            f"{what}: training diverged. {self._last_good} "
            f"Lower lr (now {self.config.rate:g}) or clip, or lengthen warmup."
        )

    def _validate(self, tokens: int | None, reporter: Reporter, *, final: bool) -> float:
        result = self._evaluated(self.model, tokens)
        if not math.isfinite(result.loss):
            raise self._diverged(f"the validation loss is {result.loss} after step {self.step}", self.step + 1)
        row = {
            "step": self.step,
            "validation_loss": result.loss,
            "validation_tokens": result.tokens,
            "final": final,
            "seconds": round(self.seconds, 4),
        }
        if not final and (found := self._health()):
            row |= found.row
            if found.warning and not self.warned:
                self.warned = True
                reporter.note(found.warning)
        said = f"step {self.step}: validation loss {result.loss:.4f} on {result.tokens:,} tokens"
        if final and self.average is not None:
            row["average_loss"] = self._evaluated(cast(LanguageModel, self.average.module), tokens).loss
            said += f", of the averaged weights {row['average_loss']:.4f}"
        self._record(row)
        reporter.note(said)
        if not final and result.loss < self.best:
            self.best = result.loss
            if self.config.keep_best:
                self._save(self.model, self.optimizer, self.average, BEST)
        return result.loss

    def _evaluated(self, model: LanguageModel, tokens: int | None) -> Evaluation:
        return evaluate(
            model,
            self.corpus,
            batch_size=self.config.batch_size,
            device=self.chosen.device,
            autocast=self.chosen.precision == "bf16",
            tokens=tokens,
            ranks=self.ranks,
        )

    def _health(self) -> Health | None:
        """Of the first windows of the held-out text."""
        config, device = self.config, self.chosen.device
        ids, _ = next(windows(self.corpus.validation, context=config.model.context, batch_size=config.batch_size))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.chosen.precision == "bf16"):
            return health(self.model, ids.to(device))

    def _recorded_validation(self) -> float | None:
        """The final validation at the present step, where the run has made it already."""

        def find() -> float | None:
            rows = [row for row in self.run.metrics() if row.get("final") and row["step"] == self.step]
            return rows[-1]["validation_loss"] if rows else None

        return self.ranks.shared(find)


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

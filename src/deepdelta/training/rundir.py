"""A run directory: the resolved configuration, the environment, metrics, the tokenizer and the last good checkpoint.

config.json              the resolved TrainConfig
environment.json         versions, machine, threads, device, commit, corpus, the checksum of tokenizer.json; the format
metrics.jsonl            one line per step, and one per validation
tokenizer.json           absent for corpora of bare ids
checkpoint.safetensors   weights, optimiser state and step, in one file so that they belong together, with a checksum
average.safetensors      on request averaged weights, at the end
best.safetensors         on request the same of the step with the lowest validation loss
checkpoints/             on request the same of the checkpoints before the last
parts/                   of several processes that share the weights, what each has of those: see `parts`
"""

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from deepdelta import notebook
from deepdelta.config import differences, from_plain, to_plain
from deepdelta.data.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from deepdelta.errors import UserError, check_utf8
from deepdelta.files import FORMAT, AnyPath, check_format, read_object, sha256_of, write_json, write_text
from deepdelta.limits import check_memory
from deepdelta.models import LanguageModel, language_model, least_bytes, parameter_count
from deepdelta.tensors import load_tensors, save_tensors
from deepdelta.training.checkpoints import (
    AVERAGE,
    BEST,
    CHECKPOINT,
    Checkpoint,
    earlier,
    keep_last,
    kept,
    load_into,
    name_of,
    read_checkpoint,
    state_of,
)
from deepdelta.training.config import TrainConfig
from deepdelta.training.metrics import damaged, is_step, last_row, read_rows
from deepdelta.training.parts import Snapshot, delete, keep_parts, parts_of, snapshot, write_checkpoint, write_parts
from deepdelta.training.ranks import ALONE, Ranks

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
UNUSED, LOCK = "unused_published.safetensors", ".lock"

SHOWN = 500
"""Points of a loss that a notebook shows."""

CHANGEABLE = (
    *("steps", "cooldown", "eval_every", "eval_tokens", "final_eval_tokens", "parallel"),
    *("checkpoint_every", "keep_last", "keep_best", "async_save", "not_finite"),
)
"""What may differ when a run is continued: none of it touches the steps already made."""

NUMERICS = ("versions", "machine", "threads", "device", "precision", "backend", "processes", "parallel")
"""What the last bits of a number depend on besides the configuration."""
ONE_PROCESS = {"processes": 1, "parallel": "none"}
"""Of an environment that says nothing else."""

CORPUS = ("corpus_sha256", "tokenizer_sha256")

TOKENIZER_SHA = "tokenizer_file_sha256"
"""The key in environment.json of the checksum of tokenizer.json, null where there is none."""


@dataclass(frozen=True, kw_only=True)
class _Imported:
    """What environment.json must hold at least of an imported run; it may hold more."""

    versions: dict[str, str]
    corpus_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class _Made(_Imported):
    """What it must hold at least of a trained one."""

    commit: str | None
    machine: dict[str, str]
    threads: int
    init_config: dict[str, Any] | None = field(default=None)


@dataclass(frozen=True, init=False)
class RunDirectory:
    """Reads and writes the files of one run."""

    path: Path

    def __init__(self, path: AnyPath) -> None:
        object.__setattr__(self, "path", Path(path))
        check_utf8("the name of a run directory", str(self.path))

    def _repr_html_(self) -> str:
        """For a notebook: what is trained here and how far it is, and its loss; a path alone where there is no run.

        Raises:
            UserError: see `config` and `metrics`.
        """
        if not self.started:
            return notebook.table("No run", [("path", self.path)])
        config, rows = self.config(), list(self.metrics())
        losses = [(float(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
        validations = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
        model = config.model
        facts: list[tuple[str, object]] = [
            ("path", self.path),
            ("residual", model.rival or f"{model.residual.rule}, V = {model.residual.value_channels}"),
            ("model", f"{model.stack}, width {model.dim}, {parameter_count(model):,} parameters"),
            ("steps", f"{len(losses):,} of {config.steps:,}"),
        ]
        facts += [("validation loss", f"{validations[-1]:.4f}")] if validations else []
        few = losses[:: max(1, len(losses) // SHOWN)]
        return notebook.shown(notebook.table("Run", facts), notebook.curve(few, "Training loss over steps"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, so that no second process trains in it.

        Raises:
            UserError: another process holds it, or there can be no directory at this path.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be a run directory: {error.strerror}. Give another run directory."
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is training in {self.path}; wait for it or stop it.") from None
            yield

    @property
    def busy(self) -> bool:
        """Whether a process is training here now."""
        if not (self.path / LOCK).exists():
            return False
        with (self.path / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def cut_short(self) -> list[Path]:
        """The files of a start that was cut short, in a directory that is no run yet: its checkpoint is at step 0.

        Raises:
            UserError: there are files of these names that no such start has left.
        """
        there = [self.path / name for name in (CHECKPOINT, METRICS, ENVIRONMENT, FILE_NAME, UNUSED)]
        parts = parts_of(self.path)
        later = [file for name in (BEST, AVERAGE) if os.path.lexists(file := self.path / name)]
        later += [file for file in earlier(self.path) if file.name != name_of(0)]
        later += [file for file, step in parts.items() if step]
        there = [*(file for file in there if os.path.lexists(file)), *later]
        try:
            ours = not there or (not later and self.metrics_path not in there and self.step() == 0)
        except UserError:
            ours = False
        there += [file for file, step in parts.items() if not step]
        if not ours:
            raise UserError(
                f"{self.path} holds {', '.join(file.name for file in there)}, which a run would overwrite, but no "
                f"{CONFIG}, so it is no run. Give another run directory, or move them away."
            )
        return there

    def clear(self) -> None:
        """Delete what a start that was cut short has left; see `cut_short`."""
        parts, there = parts_of(self.path), self.cut_short()
        for file in there:
            if file not in parts:
                file.unlink()
        if parts:
            delete([*parts], self.path)

    @property
    def metrics_path(self) -> Path:
        return self.path / METRICS

    @property
    def started(self) -> bool:
        return (self.path / CONFIG).exists()

    def config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            UserError: there is no run here, one of another format, or its configuration cannot be read.
        """
        if (self.path / ENVIRONMENT).exists():
            check_format(self._read(ENVIRONMENT), self.path)
        return from_plain(TrainConfig, self._read(CONFIG), where=str(self.path / CONFIG))

    def environment(self) -> dict[str, Any]:
        """What the run's numbers depend on besides its configuration.

        Raises:
            UserError: there is no run here, one of another format, or what every run's environment holds is missing or
                of another type.
        """
        there = self._read(ENVIRONMENT)
        check_format(there, self.path)
        kind = _Imported if "imported_from" in there else _Made
        needed = {key.name: there[key.name] for key in fields(kind) if key.name in there}
        from_plain(kind, needed, where=str(self.path / ENVIRONMENT))
        return there

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write the environment, and the checksum of the tokenizer that has been written before."""
        write_json(self.path / ENVIRONMENT, {"format": FORMAT, **environment, TOKENIZER_SHA: self._tokenizer_sha()})

    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer; None for a corpus of bare ids.

        Raises:
            UserError: it is not the one that the run was made with.
        """
        if self._tokenizer_sha() != self.environment().get(TOKENIZER_SHA):
            raise UserError(
                f"{self.path / FILE_NAME} is damaged, another or gone: it must have the checksum of {ENVIRONMENT}; "
                f"restore it, or delete {self.path} and train anew."
            )
        return load_tokenizer(self.path)

    def _tokenizer_sha(self) -> str | None:
        file = self.path / FILE_NAME
        return sha256_of(file) if file.exists() else None

    def write_config(self, config: TrainConfig) -> None:
        write_json(self.path / CONFIG, to_plain(config))

    def check_continues(self, config: TrainConfig) -> None:
        """Refuse to continue with settings that the steps already made did not have.

        Raises:
            UserError: naming every setting that differs.
        """
        there, here = to_plain(self.config()), to_plain(config)
        different = differences(
            {k: v for k, v in there.items() if k not in CHANGEABLE},
            {k: v for k, v in here.items() if k not in CHANGEABLE},
        )
        if different:
            raise UserError(
                f"{self.path} already holds a run with another configuration ({'; '.join(different)}). "
                "Give the same settings to continue it, or another run directory."
            )

    def check_environment(self, environment: Mapping[str, Any], *, exact: bool) -> None:
        """Refuse to continue on another corpus, and, if `exact`, where the numbers could come out differently.

        Raises:
            UserError: naming what differs.
        """
        there = ONE_PROCESS | self.environment()
        shards = ("shards",) if "shards" in there and "shards" in environment else ()  # which name what changed
        if different := _differing(there, environment, shards) or _differing(there, environment, CORPUS):
            raise UserError(
                f"{self.path} was trained on another corpus ({different}); restore that one: what is trained or "
                "measured on different corpora does not compare."
            )
        if exact and (different := _differing(there, environment, NUMERICS)):
            raise UserError(
                f"{self.path} was started in another environment ({different}), so it would not continue "
                "bit for bit. Restore that environment, or pass --inexact-resume to continue all the same."
            )

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The recorded lines; see `read_rows`."""
        return read_rows(self.metrics_path)

    def last_row(self) -> dict[str, Any]:
        """The last line, empty without one; see `metrics.last_row`."""
        return last_row(self.metrics_path)

    def last_recorded_step(self) -> int:
        """The step of the last line, 0 without one."""
        return int(self.last_row().get("step", 0))

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`: the steps behind them are made again.

        Raises:
            UserError: see `read_rows`; or steps up to `step` are missing.
        """
        kept = [row for row in self.metrics() if row["step"] <= step]
        if (made := sum(map(is_step, kept))) != step:
            raise damaged(
                self.metrics_path, f"must hold the {step} steps that the checkpoint has behind it, but holds {made}"
            )
        write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))

    def save_checkpoint(self, model: nn.Module, optimizer: Optimizer | None, step: int, seconds: float) -> None:
        """Write weights, optimiser state, step and training seconds as one file, whole or not at all."""
        self.write_snapshot(snapshot(state_of(model, optimizer)), step, seconds)

    def write_snapshot(
        self,
        held: Snapshot,
        step: int,
        seconds: float,
        name: str = CHECKPOINT,
        last: int = 1,
        ranks: Ranks = ALONE,
        key: str = "",
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Write a checkpoint, whole or not at all: every rank its part, and then the first rank what makes it one.

        Args:
            name: of its first file.
            last: how many are kept: this one, and the ones before it in EARLIER.
            key: by which the ranks know this checkpoint from others.
            given_up: whether to leave off waiting for the parts of others.

        Raises:
            UserError: it cannot be written, here or by another rank.
        """
        file = self.path / name
        parts = write_parts(file, held, step, ranks, key, given_up)
        if not ranks.first:
            return
        if self.metrics_path.exists():
            # On disk before the checkpoint is: a machine that fails must not leave a step whose line is lost.
            with self.metrics_path.open("rb") as rows:
                os.fsync(rows.fileno())
        write_checkpoint(file, held.whole, step, seconds, parts)
        if name == CHECKPOINT:
            keep_last(self.path, step, last)
        keep_parts(self.path, kept(self.path))

    def keep_checkpoints(self, step: int, last: int) -> None:
        """Delete what is more than the last checkpoint, at `step`, and the `last` - 1 before it."""
        keep_last(self.path, step, last)
        keep_parts(self.path, kept(self.path))

    def checkpoint(self, name: str = CHECKPOINT) -> Checkpoint:
        """The last checkpoint, or the one of that name, verified; see `read_checkpoint`."""
        kept = [str(file.relative_to(self.path)) for file in earlier(self.path)]
        if name not in (known := [CHECKPOINT, BEST, AVERAGE, *kept]):
            raise UserError(f"the weights of {self.path} are in {', '.join(known)}, got '{name}'.")
        if name != CHECKPOINT and not (self.path / name).exists():
            raise UserError(f"{self.path} holds no {name}: train with keep_best for {BEST}, average for {AVERAGE}.")
        return read_checkpoint(self.path / name)

    def step(self) -> int:
        """The step of the last checkpoint."""
        return self.checkpoint().step

    def save_unused(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what an imported model does not use, so that it can be exported whole."""
        save_tensors(self.path / UNUSED, tensors)

    def load_unused(self) -> dict[str, Tensor]:
        file = self.path / UNUSED
        return load_tensors(file, f"restore it, or import {self.path} anew")[0] if file.exists() else {}

    def model(self, name: str = CHECKPOINT) -> LanguageModel:
        """The model that the run's configuration describes, with the weights of the last checkpoint, or of that one, on
        the CPU.

        Raises:
            UserError: see `config` and `load_weights`; a configuration that describes a larger model than the weights
                are of, which is said before that model is made.
        """
        config, checkpoint = self.config().model, self.checkpoint(name)
        held = sum(tensor.numel() for tensor in checkpoint.weights.values())
        if config.layers > len(checkpoint.weights) or parameter_count(config) > held:
            raise UserError(
                f"{self.path / name} does not fit {CONFIG}, which describes a model of {config.layers:,} layers "
                f"and {parameter_count(config):,} numbers: it holds {len(checkpoint.weights):,} tensors of {held:,}."
            )
        check_memory(least_bytes(config), f"the model of {self.path}")
        model = language_model(config)
        load_into(model, checkpoint, self.path / name)
        return model

    def load_weights(self, model: nn.Module, absent: Collection[str] = ()) -> None:
        """Load the checkpoint's weights into `model`; those in `absent` keep their start where it has none for them.

        Raises:
            UserError: no checkpoint, a damaged one, or tensors that do not fit the model or are not finite.
        """
        load_into(model, self.checkpoint(), self.path / CHECKPOINT, absent)

    def _read(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.exists():
            raise UserError(f"{self.path} is not a run directory: it has no {name}.")
        return read_object(file, f"restore it, or delete {self.path} and train anew")


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return "; ".join(differences({key: there.get(key) for key in keys}, {key: here.get(key) for key in keys}))

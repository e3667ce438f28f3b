"""A run directory: the resolved configuration, the environment, metrics, the tokenizer and the last good checkpoint.

config.json              the resolved TrainConfig
environment.json         versions, machine, threads, device, commit, corpus
metrics.jsonl            one line per step, and one per validation
tokenizer.json           absent for corpora of bare ids
checkpoint.safetensors   weights, optimiser state and step, in one file so that they always belong together
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.data.tokenizer import FILE_NAME
from deepdelta.errors import UserError
from deepdelta.files import atomic_path, check_readable, naming, read_object, write_json, write_text
from deepdelta.training.config import TrainConfig

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
CHECKPOINT, UNUSED, LOCK = "checkpoint.safetensors", "unused_published.safetensors", ".lock"

CHANGEABLE = ("steps", "eval_every", "eval_tokens", "final_eval_tokens", "checkpoint_every")
"""What may differ when a run is continued: none of it touches the steps already made."""

NUMERICS = ("versions", "machine", "threads", "device", "precision", "backend")
"""What the last bits of a number depend on besides the configuration."""


@dataclass(frozen=True)
class RunDirectory:
    """Reads and writes the files of one run."""

    path: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, so that no second process trains in it.

        Raises:
            UserError: another process holds it, or there can be no directory at this path.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be a run directory: {error.strerror}. Give another --run directory."
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
        with (self.path / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def clear(self) -> None:
        """Delete what a start that was cut short may have left, or a run whose config.json was deleted."""
        for name in (CHECKPOINT, METRICS, FILE_NAME, UNUSED):
            (self.path / name).unlink(missing_ok=True)

    @property
    def metrics_path(self) -> Path:
        return self.path / METRICS

    @property
    def started(self) -> bool:
        return (self.path / CONFIG).exists()

    def config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            UserError: there is no run here, or its configuration cannot be read.
        """
        return from_plain(TrainConfig, self._read(CONFIG), where=str(self.path / CONFIG))

    def environment(self) -> dict[str, Any]:
        return self._read(ENVIRONMENT)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        write_json(self.path / ENVIRONMENT, environment)

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
                "Give the same settings to continue it, or another --run directory."
            )

    def check_environment(self, environment: Mapping[str, Any], *, exact: bool) -> None:
        """Refuse to continue on another corpus, and, if `exact`, where the numbers could come out differently.

        Raises:
            UserError: naming what differs.
        """
        there = self.environment()
        if different := _differing(there, environment, ("corpus_sha256", "tokenizer_sha256")):
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
        """The recorded lines in order; a last line that a crash cut short is left out."""
        if not self.metrics_path.exists():
            return
        with self.metrics_path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)

    def last_recorded_step(self) -> int:
        """The step of the last line, 0 without one; reads the end of the file alone."""
        if not self.metrics_path.exists():
            return 0
        with self.metrics_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{") and line.endswith(b"}")]
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`: the steps behind them are made again."""
        kept = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step]
        write_text(self.metrics_path, "".join(kept))

    def save_checkpoint(self, model: nn.Module, optimizer: Optimizer, step: int, seconds: float) -> None:
        """Write weights, optimiser state, step and training seconds as one file, whole or not at all."""
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"step": str(step), "seconds": repr(seconds)}
        with atomic_path(self.path / CHECKPOINT) as temporary:
            save_file(contiguous, temporary, metadata=metadata)

    def step(self) -> int:
        """The step of the last checkpoint."""
        return int(self._load_tensors("nothing.")[1]["step"])

    def save_unused(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what an imported model does not use, so that it can be exported whole."""
        with atomic_path(self.path / UNUSED) as temporary:
            save_file(dict(tensors), temporary)

    def load_unused(self) -> dict[str, Tensor]:
        file = self.path / UNUSED
        if not file.exists():
            return {}
        check_readable(file, "Have it made readable for you.")
        with naming(file, "read", f"Restore it, or delete {self.path} and import anew."):
            return load_file(file)

    def load_weights(self, model: nn.Module, absent: Collection[str] = ()) -> None:
        """Load the checkpoint's weights into `model`; those in `absent` keep their start where it has none for them.

        Raises:
            UserError: no checkpoint, a truncated one, or tensors that do not fit the model.
        """
        tensors, _ = self._load_tensors("model.")
        own = model.state_dict()
        missing, unknown = sorted(set(own) - set(tensors) - set(absent)), sorted(set(tensors) - set(own))
        if missing or unknown:
            raise UserError(
                f"{self.path / CHECKPOINT} does not fit this model: missing tensors {missing[:5]}, "
                f"unknown tensors {unknown[:5]}."
            )
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise UserError(
                    f"{self.path / CHECKPOINT} does not fit this model: '{name}' has shape {tuple(tensor.shape)}, "
                    f"the model's has {tuple(own[name].shape)}."
                )
        model.load_state_dict(own | tensors)

    def load_optimizer(self, model: nn.Module, optimizer: Optimizer) -> tuple[int, float]:
        """Load the optimiser's state; the step and the training seconds that the checkpoint was made at."""
        tensors, metadata = self._load_tensors("optimizer.")
        for name, parameter in model.named_parameters():
            prefix = f"{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
        return int(metadata["step"]), float(metadata["seconds"])

    def _load_tensors(self, prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        file = self.path / CHECKPOINT
        if not file.exists():
            raise UserError(f"{self.path} holds no {CHECKPOINT}; restore it, or delete the directory and train anew.")
        check_readable(file, "Have it made readable for you.")
        try:
            with safe_open(file, framework="pt") as opened:
                found = {
                    key.removeprefix(prefix): opened.get_tensor(key) for key in opened.keys() if key.startswith(prefix)
                }
                return found, opened.metadata()
        except SafetensorError as error:
            raise UserError(
                f"{file} is truncated or damaged ({error}); restore a copy, or delete {self.path} and train anew."
            ) from None

    def _read(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.exists():
            raise UserError(f"{self.path} is not a run directory: it has no {name}.")
        return read_object(file, f"restore it, or delete {self.path} and train anew")


def append_json(file: Path, row: Mapping[str, Any]) -> None:
    """Append one line, handed to the system at once, so that a killed process loses at most the line in progress."""
    with naming(file, "written"), file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, allow_nan=False) + "\n")


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return "; ".join(differences({key: there.get(key) for key in keys}, {key: here.get(key) for key in keys}))

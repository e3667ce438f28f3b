"""Checkpoints written on a thread while steps go on."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from types import TracebackType

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from deepdelta.errors import UserError
from deepdelta.training.checkpoints import CHECKPOINT, state_of
from deepdelta.training.parts import Snapshot, snapshot
from deepdelta.training.ranks import Ranks
from deepdelta.training.rundir import RunDirectory


class Saver:
    """Writes a run's checkpoints, one at a time; a context, at whose end nothing is being written.

    Args:
        ranks: they hold the model together, and all of them call every method.
        beside: write on a thread what was copied to host memory, so that steps need not wait for the disk.
    """

    def __init__(self, run: RunDirectory, ranks: Ranks, *, beside: bool) -> None:
        self.run, self.ranks, self.beside = run, ranks, beside
        self.saved: int | None = None
        """The step of the last good checkpoint."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[int | None] | None = None
        self._count, self._given_up = 0, Event()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._given_up.set()  # other ranks may be gone, whose parts a checkpoint would wait for
        if self._writing is not None:
            wait([self._writing])
        self._thread.shutdown()

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        average: AveragedModel | None,
        step: int,
        seconds: float,
        name: str,
        last: int,
    ) -> None:
        """Begin to write a checkpoint, as soon as the one before it is written; see `RunDirectory.write_snapshot`.

        Raises:
            UserError: see `settle`.
        """
        self.settle()
        held = snapshot(state_of(model, optimizer, average), self.ranks, copied=self.beside)
        self._count += 1
        self._writing = self._thread.submit(self._write, held, step, seconds, name, last, f"saved/{self._count}")
        if not self.beside:
            self.settle()

    def settle(self) -> None:
        """Wait for what is being written.

        Raises:
            UserError: it could not be written, by whichever rank.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        error = writing.exception()
        problem = next(filter(None, self.ranks.gathered(None if error is None else str(error))), None)
        if error is not None:
            raise error
        if problem is not None:
            raise UserError(problem)
        self.saved = writing.result() if writing.result() is not None else self.saved

    def _write(self, held: Snapshot, step: int, seconds: float, name: str, last: int, key: str) -> int | None:
        """The step, where this is the run's last checkpoint now."""
        self.run.write_snapshot(held, step, seconds, name, last, self.ranks, key, self._given_up.is_set)
        return step if name == CHECKPOINT else None

"""Batches of successive steps, the next one made while the present step is at work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Prefetched:
    """What `make(step)` returns, made on a thread before it is asked for where steps follow one another.

    Since a batch is a pure function of its step, what was made in vain is dropped. An error of `make` comes when its
    step is asked for.

    Args:
        pinned: keep it in page-locked memory, from which a CUDA device copies while it computes.
    """

    def __init__(self, make: Callable[[int], Batch], *, pinned: bool) -> None:
        self.make, self.pinned = make, pinned
        self.thread = ThreadPoolExecutor(1, "batches")
        self.ahead: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        ahead, self.ahead = self.ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == step else self._made(step)
        self.ahead = step + 1, self.thread.submit(self._made, step + 1)
        return found

    def _made(self, step: int) -> Batch:
        inputs, labels = self.make(step)
        return (inputs.pin_memory(), labels.pin_memory()) if self.pinned else (inputs, labels)

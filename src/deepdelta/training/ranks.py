"""The processes that train one run together; of one process alone, each method here does what that one does.

torchrun starts them, or what sets the same variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. What they
tell each other beside tensors is JSON, through the store that they meet at.
"""

import itertools
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from deepdelta.config import differences
from deepdelta.errors import Told, UserError

T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds that ranks wait for each other."""
LONGEST = 1e6
"""Of these, what may be asked for: eleven days."""
ANSWER = 10.0
"""Seconds within which a rank that lives has noticed that another has stopped."""

_MEETINGS = itertools.count()


class Ranks:
    """One process among those that train a run; the first of them alone writes, prints and decides."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, timeout: float = TIMEOUT) -> None:
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        self.sharing = size
        """How many ranks share the rows of a batch."""
        self.parent = os.getppid()
        self.calls = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def started_together(self) -> bool:
        """Whether there is a process group, be it of one rank."""
        return self.store is not None

    @property
    def orphaned(self) -> bool:
        """Whether what started the ranks is gone."""
        return self.started_together and os.getppid() != self.parent

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch: those from rank n / size on, or all where every rank takes all."""
        if self.sharing == 1:
            return batch
        count = len(batch)
        return batch[self.rank * count // self.size : (self.rank + 1) * count // self.size]

    def summed(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks, on each of them in the same bits."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return flag if self.size == 1 else bool(self.summed(torch.tensor(float(flag))).item())

    def shared(self, find: Callable[[], T]) -> T:
        """What the first rank finds, on every rank: plain data. Where it fails, every rank ends."""
        if not self.started_together:
            return find()
        self.calls += 1
        key = f"shared/{self.calls}"
        if self.first:
            found = find()
            self.store.set(key, json.dumps(found))
            return found
        return json.loads(self._wait(key, 0))  # type: ignore[no-any-return]

    def gathered(self, found: T) -> list[T]:
        """What every rank has found, plain data, on each of them."""
        if not self.started_together:
            return [found]
        self.calls += 1
        self.hand_in(f"gathered/{self.calls}", found)
        return self.handed_in(f"gathered/{self.calls}")

    def hand_in(self, key: str, found: Any) -> None:
        """Give plain data to whoever asks for them by `key`; unlike `shared` and `gathered`, from any thread."""
        self.store.set(f"{key}/{self.rank}", json.dumps(found))

    def handed_in(self, key: str, given_up: Callable[[], bool] = lambda: False) -> list[Any]:
        """What every rank has given by `key`, as soon as it has, or refused where that is given up."""
        return [json.loads(self._wait(f"{key}/{rank}", rank, given_up)) for rank in range(self.size)]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse ranks of which these facts differ.

        Raises:
            UserError: naming the rank and the facts.
        """
        first, *others = self.gathered(dict(facts))
        for rank, there in enumerate(others, start=1):
            if different := differences(there, first):
                raise UserError(
                    f"every process must be started with the same, but rank {rank} differs from rank 0 here: "
                    f"{'; '.join(different)}."
                )

    def _wait(self, key: str, owner: int, given_up: Callable[[], bool] = lambda: False) -> str:
        """What the rank `owner` says at `key`; refused where it has ended, or says nothing in time."""
        end, pause = time.monotonic() + self.timeout, 0.002
        while not self.store.check([key]) and time.monotonic() < end and not given_up():
            if self.store.check([f"ended/{owner}"]):
                raise UserError(f"rank {owner} has stopped: {self._said(f'ended/{owner}')}")
            time.sleep(pause := min(1.5 * pause, 0.1))
        if self.store.check([key]):
            return self._said(key)
        raise UserError(f"rank {owner} of {self.size} has not answered for {self.timeout:g} s; {CONTINUES}")

    def _said(self, key: str) -> str:
        return self.store.get(key).decode()  # type: ignore[no-any-return]

    def ended(self, error: BaseException) -> BaseException:
        """What this rank says of the error that ends it; what another rank has told of is not told again."""
        try:
            if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
                self.store.set(f"own/{self.rank}", "")
            self.store.set(f"ended/{self.rank}", str(error).partition("\n")[0] or type(error).__name__)
            if not self.store.check([f"own/{self.rank}"]) and (ended := self._who_ended()):
                error = UserError(ended)
            first = isinstance(error, RuntimeError) or self.store.add("told", 1) == 1
            return error if first or not isinstance(error, UserError) else Told(str(error))
        except RuntimeError:
            return UserError(f"what started the {self.size} ranks is gone, and the store that they met at; {CONTINUES}")

    def _who_ended(self) -> str | None:
        """Why a collective most likely failed: a rank that says nothing is gone, or one had an error of its own."""
        ranks, end = range(self.size), time.monotonic() + ANSWER
        while missing := [rank for rank in ranks if not self.store.check([f"ended/{rank}"])]:
            if time.monotonic() > end:
                who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {self.size}"
                return f"{who} ended without a word: killed, stuck, or the machine is gone; {CONTINUES}"
            time.sleep(0.05)
        told = [rank for rank in ranks if self.store.check([f"own/{rank}"])]
        return f"rank {told[0]} has stopped: {self._said(f'ended/{told[0]}')}" if told else None


CONTINUES = "the same command goes on from the last checkpoint."

ALONE = Ranks()


def starts_first() -> bool:
    """Whether this process is alone, or the first of those that it was started among, which need not have met yet."""
    return not _started_together() or int(os.environ["RANK"]) == 0


def _started_together() -> bool:
    """Whether torchrun's numbers are set; UserError where they are none."""
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if wrong := [name for name, value in given.items() if not value.isdecimal()]:
        raise UserError(f"{wrong[0]} must be a whole number, as torchrun sets it, got '{given[wrong[0]]}'; unset it.")
    return len(given) == 2


@contextmanager
def together(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The ranks that this process was started among, as long as the block lasts.

    Raises:
        UserError: they do not meet within `timeout` seconds, or one of them ends before the others.
    """
    if not 0 < timeout <= LONGEST:
        raise UserError(f"timeout must lie in (0, {LONGEST:,.0f}] seconds, got {timeout:g}.")
    if not _started_together():
        yield ALONE
        return
    ranks = _met(timeout)
    try:
        with warnings.catch_warnings():
            # What a layer returns is changed in place by nothing here.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            yield ranks
        ranks.any(False)  # none leaves before the last has nothing more to ask
    except BaseException as error:
        with _unhurried():
            told = ranks.ended(error)
        if told is error:
            raise
        raise told from error
    finally:
        dist.destroy_process_group()


@contextmanager
def _unhurried() -> Iterator[None]:
    """SIGTERM, which torchrun sends the others as soon as one rank has ended, does not keep them from saying which."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _met(timeout: float) -> Ranks:
    if dist.is_initialized():
        raise UserError("torch.distributed is set up already; train() does so itself: leave it, or end it before.")
    wait = timedelta(seconds=timeout)
    try:
        meeting, rank, size = next(rendezvous("env://", timeout=wait))
        meeting.set_timeout(wait)
        store = PrefixStore(f"deepdelta/{next(_MEETINGS)}", meeting)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group = PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes of this run have not met at {where} within {timeout:g} s "
            f"({str(error).partition(chr(10))[0]:.200}): start as many as WORLD_SIZE says, or give a longer --timeout."
        ) from error
    return Ranks(rank, size, store, timeout)

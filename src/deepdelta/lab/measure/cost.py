"""Speed and memory of a training step, several conditions measured against each other in one process."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from deepdelta.device import Device, choose_device, keep_freed_memory
from deepdelta.errors import UserError, nearest
from deepdelta.lab.measure.memory import peak_bytes
from deepdelta.lab.measure.traffic import moved_bytes
from deepdelta.models import language_model
from deepdelta.training.config import TrainConfig
from deepdelta.training.loop import check_size, set_runtime
from deepdelta.training.optimizer import build_optimizer
from deepdelta.training.step import micro_losses, training_step

WARM_UP = 2
"""Steps of each condition before anything is measured: the first one allocates the optimiser's state."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one condition's training step (forward, backward, clipping, optimiser)."""

    tokens_per_second: float
    """Median over rounds."""
    speed_ratio: float
    """Median over rounds of tokens/s divided by the baseline's in the same round."""
    speed_ratio_low: float
    """The least of the rounds."""
    speed_ratio_high: float
    """The greatest of the rounds."""
    rounds: int
    peak_bytes: int
    """Peak memory of allocated tensors in a step (see `deepdelta.lab.measure.memory`)."""
    peak_ratio: float
    """peak_bytes divided by the baseline's."""
    moved_bytes: float | None = None
    """Bytes per token that a step moves (see `deepdelta.lab.measure.traffic`); None: not counted when it was timed."""


def measure_costs(
    configs: Mapping[str, TrainConfig],
    *,
    vocab_size: int,
    rounds: int,
    baseline: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Cost]:
    """Cost of each condition, by name.

    Every round makes one training step of every condition (see `interleaved`). All models live at once. Token ids are
    random: the work does not depend on them.

    Args:
        configs: the conditions; device, precision and threads must be the same in all.
        vocab_size: the vocabulary of models whose configuration leaves it open.
        rounds: how many rounds are timed, after warm-up and the measurement of memory.
        baseline: the condition that ratios refer to.
        progress: called as progress(rounds done, rounds).

    Raises:
        UserError: an unknown baseline, no rounds, conditions on different devices, or a device that is absent.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, got {rounds}.")
    if baseline not in configs:
        raise UserError(f"baseline must be one of the conditions, got '{baseline}'; {nearest(baseline, configs)}")
    for field in ("device", "precision", "threads"):
        values = {getattr(config, field) for config in configs.values()}
        if len(values) > 1:
            raise UserError(f"{field} must be the same in all conditions to compare costs, got {values}; set one.")
    first = configs[baseline]
    chosen = choose_device(first.device, first.precision)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(first.threads or threads_before)
    keep_freed_memory()
    try:
        trials = {name: trial(config, vocab_size, chosen) for name, config in configs.items()}
        for one in trials.values():
            for _ in range(WARM_UP):
                one.step(one.forward)
        peaks = {name: one.peak_bytes() for name, one in trials.items()}
        moved = {name: one.moved_bytes() for name, one in trials.items()}
        times = _timed(trials, rounds, progress)
    finally:
        torch.set_num_threads(threads_before)
    speeds = {name: [trials[name].config.tokens_per_step / seconds for seconds in times[name]] for name in trials}
    costs = {}
    for name, speed in speeds.items():
        ratios = [one / reference for one, reference in zip(speed, speeds[baseline], strict=True)]
        costs[name] = Cost(
            tokens_per_second=statistics.median(speed),
            speed_ratio=statistics.median(ratios),
            speed_ratio_low=min(ratios),
            speed_ratio_high=max(ratios),
            rounds=rounds,
            peak_bytes=peaks[name],
            peak_ratio=peaks[name] / peaks[baseline],
            moved_bytes=moved[name] / trials[name].config.tokens_per_step,
        )
    return costs


def interleaved(
    runs: Mapping[str, Sequence[Callable[[], object]]],
    *,
    rounds: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[tuple[float, ...]]]:
    """Seconds of each run in each round, from its beginning to the end of each of its stages.

    Every round makes every run once, in an order drawn anew (with a fixed seed), so that what else slows the machine
    down meets all runs alike.
    """
    shuffle = random.Random(0).sample
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    for done in range(1, rounds + 1):
        for name in shuffle(list(runs), len(runs)):
            ends = []
            _synchronize(device)
            began = time.perf_counter()
            for stage in runs[name]:
                stage()
                _synchronize(device)
                ends.append(time.perf_counter() - began)
            times[name].append(tuple(ends))
        if progress is not None:
            progress(done, rounds)
    return times


def _timed(
    trials: Mapping[str, "Trial"], rounds: int, progress: Callable[[int, int], None] | None
) -> dict[str, list[float]]:
    """Seconds of each condition's step in each round."""
    runs = {name: (partial(one.step, one.forward),) for name, one in trials.items()}
    device = next(iter(trials.values())).chosen.device
    times = interleaved(runs, rounds=rounds, device=device, progress=progress)
    return {name: [seconds for (seconds,) in rows] for name, rows in times.items()}


class Trial:
    """A model, its optimiser and a batch, ready to make the same training step again and again."""

    def __init__(self, model: nn.Module, forward: nn.Module, ids: Tensor, config: TrainConfig, chosen: Device) -> None:
        """
        Args:
            forward: the model, or what it was compiled to.
            ids: token ids (B, T + 1).
        """
        self.model, self.forward, self.ids, self.config, self.chosen = model, forward, ids, config, chosen
        self.optimizer = build_optimizer(model, config)

    def losses(self, forward: nn.Module) -> Iterator[Tensor]:
        return micro_losses(forward, self.ids[:, :-1], self.ids[:, 1:], self.config.accumulate, self.chosen)

    def step(self, forward: nn.Module) -> None:
        """What `deepdelta.training` does in a step, apart from reading the batch and writing the record."""
        training_step(self.model, self.optimizer, self.losses(forward), clip=self.config.clip)

    def peak_bytes(self) -> int:
        """Of the step as it runs on CUDA; elsewhere of the uncompiled step, since the compiled one cannot be seen."""
        forward = self.forward if self.chosen.device.type == "cuda" else self.model
        return peak_bytes(lambda: self.step(forward), self.held)

    def moved_bytes(self) -> int:
        """Of the uncompiled step."""
        return moved_bytes(lambda: self.step(self.model))

    @property
    def held(self) -> list[Tensor]:
        state = chain.from_iterable(values.values() for values in self.optimizer.state.values())
        return [self.ids, *self.model.parameters(), *self.model.buffers(), *state]


def trial(config: TrainConfig, vocab_size: int, chosen: Device) -> Trial:
    """A condition with a batch of random ids; `vocab_size` where its configuration leaves that open."""
    vocab_size = config.model.vocab_size or vocab_size
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    check_size(config, chosen)
    model = language_model(config.model, config.seed).to(chosen.device)
    set_runtime(model, config)
    shape = (config.accumulate * config.batch_size, config.model.context + 1)
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(config.seed))
    forward: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
    return Trial(model, forward, ids.to(chosen.device), config, chosen)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

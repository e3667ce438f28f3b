"""What a benchmark measures, as frozen dataclasses: a suite of groups of cases.

All cases of a group do the same work at the same sizes in the same rounds; ratios are taken within a group only.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from deepdelta.config import Count, Settings
from deepdelta.errors import UserError, nearest
from deepdelta.lab.bench.networks import NetworkName
from deepdelta.models import Rival
from deepdelta.nn import Backend, ResidualConfig

Work = Literal["training", "memory", "prefill", "decoding", "operator", "network"]
MEASURES: dict[Work, tuple[str, ...]] = {
    "training": ("forward_backward", "step"),
    "memory": (),
    "prefill": ("forward",),
    "decoding": ("decoding",),
    "operator": ("forward", "forward_backward"),
    "network": ("forward_backward", "step"),
}
"""What is timed of each work; `step` is forward, backward, clipping and fused AdamW."""
ADDED: dict[Work, str] = {"operator": "triad", "network": "plain"}
"""The case that a work adds by itself, and that ratios may refer to: what the memory allows; the network in PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to do a group's work: a residual of this package with one of its backends, or a rival."""

    name: str
    residual: ResidualConfig | None = None
    backend: Backend = "reference"
    rival: Rival | None = None

    def __post_init__(self) -> None:
        if (self.residual is None) == (self.rival is None):
            raise UserError(f"case {self.name}: give either residual or rival.")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a case must reach: a ratio of throughputs (at_least) or of peak memory (at_most) to another case."""

    case: str
    against: str
    measure: str = "forward_backward"
    """What is compared: a measure of the group's work, or `peak`."""
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise UserError(f"bar of {self.case}: give either at_least or at_most.")
        if (self.measure == "peak") != (self.at_least is None):
            raise UserError(f"bar of {self.case}: peak memory has at_most, speed has at_least.")


@dataclass(frozen=True, kw_only=True)
class Group(Settings):
    """Cases that do the same work at the same sizes, timed in the same interleaved rounds."""

    name: str
    work: Work
    cases: tuple[Case, ...]
    baseline: str
    """The case that ratios refer to, of the group's or of ADDED."""
    dim: Count
    network: NetworkName | None = None
    """Of the work `network`: which."""
    layers: Count = 1
    heads: Count = 4
    batch: Count = 8
    context: Count = 256
    """Tokens per sequence; decoding starts with none and adds them one at a time."""
    vocab_size: Count = 512
    threads: Count | None = None
    """CPU threads of this group; None: those of the run."""
    precision: Literal["fp32", "bf16"] | None = None
    """Another than the suite's."""
    compiled: bool = False
    """torch.compile with its default backend."""
    captured: bool = False
    """Decoding as one CUDA graph, replayed: without the calls that each token takes."""
    bars: tuple[Bar, ...] = ()
    axis: str | None = None
    """The quantity that grows from group to group of a curve, and `value` where it stands in this one."""
    value: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [case.name for case in self.cases]
        if not names or len(set(names)) != len(names):
            raise UserError(f"group {self.name}: cases must have different names, at least one, got {names}.")
        known = [*names, ADDED[self.work]] if self.work in ADDED else names
        measures = (*MEASURES[self.work], "peak") if self.work in ("training", "memory") else MEASURES[self.work]
        for name in (self.baseline, *(n for bar in self.bars for n in (bar.case, bar.against))):
            if name not in known:
                raise UserError(f"group {self.name}: there is no case '{name}'; {nearest(name, known)}")
        for bar in self.bars:
            if bar.measure not in measures:
                raise UserError(
                    f"group {self.name}: nothing measures '{bar.measure}'; {nearest(bar.measure, measures)}"
                )
        if (self.network is None) == (self.work == "network"):
            raise UserError(f"group {self.name}: the work 'network' and no other names a network, got {self.network}.")
        if self.work in ("operator", "decoding", "network") and any(case.rival is not None for case in self.cases):
            raise UserError(f"group {self.name}: rivals have no {self.work} to time; leave them out.")
        if self.work in ("memory", "decoding", "operator", "network") and self.compiled:
            raise UserError(f"group {self.name}: {self.work} is measured uncompiled; set compiled=False.")
        if self.captured and self.work != "decoding":
            raise UserError(f"group {self.name}: decoding alone is captured, got {self.work}; set captured=False.")


@dataclass(frozen=True, kw_only=True)
class Suite(Settings):
    """Groups that answer one question."""

    name: str
    question: str
    groups: tuple[Group, ...]
    rounds: Count = 30
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast in training and prefill, and the state's dtype in the operator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [group.name for group in self.groups]
        if not names or len(set(names)) != len(names):
            raise UserError(f"suite {self.name}: groups must have different names, at least one, got {names}.")


def quick(suite: Suite) -> Suite:
    """The same suite in minutes, to see that all of it runs: small batches, two layers, five rounds, nothing compiled.
    Where there is no GPU, a suite for one runs on the CPU. Its figures are no measurement of the bar."""
    absent = suite.device == "cuda" and not torch.cuda.is_available()
    groups = tuple(
        replace(
            group,
            batch=min(group.batch, 512 if group.work == "operator" else 2),
            context=min(group.context, 64),
            layers=min(group.layers, 2),
            captured=group.captured and not absent,
            bars=(),
        )
        for group in suite.groups
        if not group.compiled
    )
    if not groups:
        raise UserError(f"suite {suite.name} has nothing but compiled groups, which --quick leaves out.")
    return replace(suite, groups=groups, rounds=min(suite.rounds, 5), device="cpu" if absent else suite.device)

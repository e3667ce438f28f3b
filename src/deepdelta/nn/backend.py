"""Which code does a rewrite, or a convolution over tokens: what `auto` takes, and why.

Decided anew in every call, of what the call is given and nothing else: there is no state to set, and nothing under
torch.compile that another size would make it compile again for.
"""

import inspect
import warnings
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from deepdelta.nn.config import ResidualConfig
from deepdelta.ops.step import DTYPES, NEEDS, known_problem

Backend = Literal["auto", "reference", "fused"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# Chains of 4 residuals around one linear map, forward and backward, two threads, 1 to 2,048 rows, d 16 to 128: speed of
# fused code over plain PyTorch. Delta and the default at V = 1: 0.75 to 0.97 below 4,096 numbers, 0.99 and 1.03 at
# 16,384, 1.2 at 32,768; at V = 4 1.06 and 1.13 at 1,024, 1.17 at 8,192, 1.9 at a million. Additive at V = 4: 0.80 at
# 8,192, 1.01 at 131,072, 1.24 at a million. Channels at V = 4: 0.80, 0.95, 1.03. The
# embedding convolution: 1.34 at 1,024, 1.57 at 4,096, 1.97 at 65,536.
LEAST = 1 << 13
"""Numbers of a state, rows times V times D, from which fused code is faster than plain PyTorch, eager on the CPU."""
LEAST_SIMPLE = 1 << 18
"""The same for rewrites that plain PyTorch does in one or two operations."""
# Speed of the additive model that a GPT of paper-cc keeps, plain PyTorch and fused, compiled: 0.811 and 0.856 at d 128,
# 0.856 and 0.905 at d 256 (2 layers, two threads); 0.941 and 0.962 at d 768, and at V = 1 0.981 and 0.960 at d 256,
# 0.988 and 0.986 at d 768 (results/bench-bar). Narrower ones were not measured: a call costs more there than its work.
LEAST_COMPILED = 128
"""The width from which the fused rewrite is faster than what torch.compile makes of plain PyTorch, on the CPU."""


class Work(NamedTuple):
    """What is to be done, as far as the choice depends on it."""

    value_channels: int
    dim: int
    rule: str = ""
    convolves: bool = False
    """Whether it is a convolution over tokens."""
    channel_first: bool = False
    """Whether the state is (N, V, C, *space)."""

    @property
    def least(self) -> int:
        return LEAST_SIMPLE if self.rule in ("additive", "channels") else LEAST

    @classmethod
    def rewrite(cls, config: ResidualConfig, dim: int, channel_first: bool) -> "Work":
        return cls(config.value_channels, dim, config.rule, channel_first=channel_first)


class Chosen(NamedTuple):
    backend: str
    """reference or fused."""
    reason: str


def auto(
    work: Work, device: torch.device, dtype: torch.dtype, *, numbers: int | None = None, compiled: bool = False
) -> Chosen:
    """What `auto` takes for a state of so many numbers, rows times V times D (None: very many), and why."""
    reason = _against(work, device.type, dtype, numbers, compiled)
    return Chosen("fused", "faster than plain PyTorch") if reason is None else Chosen("reference", reason)


def runs_fused(backend: Backend, work: Work, like: Tensor, numbers: int) -> bool:
    """Whether fused code runs in this call, for a state of so many numbers on the device and of the dtype of `like`."""
    if backend != "auto":
        return backend == "fused" and (like.device.type == "cpu" or not work.convolves)
    if not torch.compiler.is_compiling():
        return _against(work, like.device.type, like.dtype, numbers, False) is None
    # What is exported runs where this package may not be.
    return not torch.compiler.is_exporting() and _against(work, like.device.type, like.dtype, None, True) is None


def _against(work: Work, device: str, dtype: torch.dtype, numbers: int | None, compiled: bool) -> str | None:
    """Why `auto` takes plain PyTorch: it is at least as fast, or all that there is. None where it does not."""
    if work.convolves:
        if device != "cpu":
            return "fused convolutions are for the CPU"
    elif work.rule == "additive" and work.value_channels == 1:
        return "the rewrite is a plain addition"
    elif work.channel_first and device == "cpu" and work.value_channels == 1:
        # Fused code gives it back channels-last, and a convolution that meets another layout rounds otherwise.
        return "channel-first on the CPU at V = 1"
    elif compiled and device == "cpu" and work.value_channels == 1:
        return "compiled for the CPU at V = 1"
    elif compiled and device == "cpu" and work.dim < LEAST_COMPILED:
        return f"compiled for the CPU at d < {LEAST_COMPILED}"
    if numbers is not None and device == "cpu" and numbers < work.least:
        return f"states of fewer than {work.least:,} numbers"
    problem: str | None = _problem(device, dtype)
    return problem


def _asked(device: str, dtype: torch.dtype) -> str | None:
    """Why fused code cannot run; said once where the user can mend it."""
    problem = known_problem(torch.device(device), dtype)
    if problem is not None and device in NEEDS and dtype in DTYPES:
        _say(f"{problem}; until then the backend 'auto' takes plain PyTorch, which is slower.")
    return problem


# Unwrapped of the checks that the tests put around every function.
_problem: Any = inspect.unwrap(_asked)
# What torch.compiler.assume_constant_result sets, which would import the compiler.
_problem._dynamo_marked_constant = True


@cache
def _say(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def described(backend: Backend, work: Work, like: Tensor | None) -> str:
    """The backend, and what `auto` stands for where a tensor like this is: eager, and compiled."""
    if backend != "auto" or like is None:
        return backend
    device = like.device
    eager, compiled = (_against(work, device.type, like.dtype, None, compiles) for compiles in (False, True))
    if eager is not None:
        return f"auto: reference ({eager})"
    least = f" from {work.least:,} numbers of state" if device.type == "cpu" else ""
    return f"auto: fused{least}" + ("" if compiled is None else f"; compiled: reference ({compiled})")

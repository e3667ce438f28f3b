"""What a retrofit may be told, and what it tells."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from deepdelta.config import Settings
from deepdelta.nn.config import Gate, ResidualConfig
from deepdelta.nn.presets import PRESETS

Trainable = Literal["all", "residual"]


@dataclass(frozen=True, kw_only=True)
class RetrofitConfig(Settings):
    """The options of `retrofit`; rule, expansion and compression are those that leave the function as it is."""

    value_channels: int = 4
    """V, the number of vectors that the state holds; all of them start as the plain network's own."""
    trainable: Trainable = "all"
    """all: every parameter keeps what it had; residual: those of the plain network are frozen."""
    gate: Gate = "linear"
    """The erase gate, one per value channel unless it is constant (docs/method.md#gate)."""
    gate_hidden: int = 128
    """Hidden width of `two_layer`."""
    gate_hidden_bias: bool = True
    """A bias in the first layer of `two_layer`."""
    erase_init: float = 1.0
    """The erase gate at the start, before the learned number a = 0 that opens it; at 1 its slope is largest."""
    direction_eps: float = 1e-5
    """eps of k = h / sqrt(|h|^2 + eps^2)."""
    seed: int | None = None
    """What the gates are drawn from; None takes it from torch's generator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.residual()

    def residual(self) -> ResidualConfig:
        """The settings of every residual, for networks that norm the branch's input themselves.

        The value channels start equal, so that norms and activations on each of them leave the function as it is. They
        part because they are read with different weights, which add up to 1, and because each has its own gate.
        """
        return replace(
            PRESETS["retrofit"],
            value_channels=self.value_channels,
            gate=self.gate,
            gate_hidden=self.gate_hidden,
            gate_hidden_bias=self.gate_hidden_bias,
            gate_per_channel=self.gate != "constant",
            erase_init=self.erase_init,
            direction_eps=self.direction_eps,
            norm="none",
        )


class RetrofitOptions(TypedDict, total=False):
    """The fields of `RetrofitConfig` beside value_channels, as editors and type checkers know them."""

    trainable: Trainable
    gate: Gate
    gate_hidden: int
    gate_hidden_bias: bool
    erase_init: float
    direction_eps: float
    seed: int | None


@dataclass(frozen=True)
class RetrofitReport:
    """What `retrofit` did to a model."""

    families: tuple[str, ...]
    """The kinds of network that it found, one per stack of blocks."""
    config: RetrofitConfig
    """Its options, the seed filled in."""
    added: Mapping[str, int]
    """Parameters added, by the name of the block (or other module) that holds them."""
    plain: int
    """Parameters of the plain model."""
    trained: int
    """Parameters that require a gradient now."""

    @property
    def parameters_added(self) -> int:
        return sum(self.added.values())

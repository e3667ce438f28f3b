"""Where the direction k comes from: vectors a, and a scale s with k = s a, so that k itself is never stored.

Shapes: V value channels, D compute width, r rank; `...` any leading axes.
"""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.linear import Initialised, Linear
from deepdelta.ops.step.reference import Normalise


def normalisation(config: ResidualConfig, width: int) -> Normalise:
    """The scale s with k = s a that `direction_norm` gives a vector a (docs/method.md#direction).

    - unit: s = 1 / sqrt(|a|^2 + eps^2); at a = 0, k = 0 with derivative 1 / eps. The target `magnitude` has this s
      as a divisor: the rest of it is written along a itself, as rules that write h write all of theirs.
    - operator: A = I - beta a a^T / (a^T a + eps), the write divided alike; the read compares a^T X with v.
    - bounded: s = 1 / sqrt(|a|^2 + D), so |k| < 1 and beta |k|^2 < 2 by construction.
    - free: s = 1 / sqrt(D), so |k| is the rms of a, unbounded; for study.
    """
    eps = config.direction_eps
    return {
        "unit": Normalise(eps * eps, 0 if config.target_carries_branch or config.writes_branch else 1),
        "operator": Normalise(eps, 2),
        "bounded": Normalise(float(width), 1),
        "free": Normalise(None, 1, 1 / math.sqrt(width)),
    }[config.direction_norm]


class BranchDirection(nn.Module):
    """The branch output h is the direction; for rank r > 1, r learned maps of it."""

    def __init__(self, config: ResidualConfig, dim: int, std: float) -> None:
        super().__init__()
        self.rank = config.rank
        if config.rank > 1:
            self.maps = Linear(dim, config.rank * dim, std=std)

    def forward(self, state_VD: Tensor, h_D: Tensor) -> tuple[Tensor, ...]:
        return (h_D,) if self.rank == 1 else self.maps(h_D).chunk(self.rank, dim=-1)


class PooledDirection(Initialised):
    """k from MLP(pool(X)): pooling is over the token's own value channels, never over tokens (v1)."""

    def __init__(self, config: ResidualConfig, dim: int, std: float) -> None:
        super().__init__()
        self.pool, self.rank = config.direction_pool, config.rank
        self.std = std
        width = dim * config.value_channels if self.pool == "flatten" else dim
        self.inner = Linear(width, config.direction_hidden, std=std, bias=0.0)
        self.outer = Linear(config.direction_hidden, config.rank * dim, std=std, bias=0.0)
        if self.pool == "attention":
            self.query = nn.Parameter(torch.empty(dim))

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, self.std, generator=generator)

    def forward(self, state_VD: Tensor, h_D: Tensor) -> tuple[Tensor, ...]:
        if self.pool == "flatten":
            pooled = state_VD.flatten(-2)
        elif self.pool == "mean":
            pooled = state_VD.mean(-2)
        else:
            logits_V = state_VD @ self.query.to(state_VD.dtype) / math.sqrt(state_VD.shape[-1])
            pooled = (logits_V.softmax(-1).unsqueeze(-2) @ state_VD).squeeze(-2)
        raw: Tensor = self.outer(F.silu(self.inner(pooled)))
        return raw.chunk(self.rank, dim=-1)


def build_direction(config: ResidualConfig, dim: int, std: float) -> BranchDirection | PooledDirection:
    kind = BranchDirection if config.direction == "branch" else PooledDirection
    return kind(config, dim, std)

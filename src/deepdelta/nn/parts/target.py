"""Where the target v comes from (docs/method.md#target), and the writes of the rules that carry h itself.

Shapes: V value channels, D compute width, r rank; x_in the branch's input before the norm, c after it, h the branch
output.
"""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.linear import Initialised, Linear
from deepdelta.ops import accumulation_dtype


class Target(Initialised):
    """v, (..., r, V): linear W c; affine v0 (1 + W c); scaled_sigmoid s sigmoid(W x_in + b); linear_input W x_in + b;
    constant; magnitude |h| (1 + W c), or 1 + W c where that is written along h; branch W h.

    v0 (r V), `level`, is learned. Unlike in v0 + W c, what the map adds is relative to v0: tokens deviate from v0 by
    the same share whatever its size, and W learns in proportion to it.
    """

    def __init__(self, config: ResidualConfig, dim: int, std: float) -> None:
        super().__init__()
        self.kind, self.channels, self.rank = config.target, config.value_channels, config.rank
        self.scale, self.value, self.eps = config.target_scale, config.target_value, config.direction_eps
        self.along_h = config.target_carries_branch
        if self.kind != "constant":
            biased = self.kind in ("scaled_sigmoid", "linear_input")
            self.map = Linear(dim, self.rank * self.channels, std=std, bias=0.0 if biased else None)
        self.level_start = config.target_init
        self.level = nn.Parameter(torch.empty(self.rank * self.channels)) if self.kind == "affine" else None

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(self.level_start)

    def linear_map(self) -> tuple[Tensor, Tensor]:
        """Weights (r V, D) and biases (r V) of v as a linear map of c, for `linear` and `affine`."""
        weight = self.map.weight
        if self.level is None:
            return weight, weight.new_zeros(len(weight))
        return self.level.unsqueeze(-1) * weight, self.level

    def forward(
        self, x_in_D: Tensor | None, c_D: Tensor, h_D: Tensor, vectors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """One v (..., V) per rank; `vectors` are what the r directions are made of."""
        if self.kind == "constant":
            shape = (*c_D.shape[:-1], self.channels)
            return (torch.full(shape, self.value, dtype=c_D.dtype, device=c_D.device),) * self.rank
        source = {"linear": c_D, "affine": c_D, "magnitude": c_D, "branch": h_D}.get(self.kind, x_in_D)
        assert source is not None, "a reading that drops x_in goes with targets that do not need it"
        v = self.map(source)
        v_rV: tuple[Tensor, ...] = (v if self.level is None else self.level * (1 + v)).chunk(self.rank, dim=-1)
        if self.kind == "scaled_sigmoid":
            return tuple(self.scale * torch.sigmoid(v) for v in v_rV)
        if self.along_h:
            return tuple(1 + v for v in v_rV)
        if self.kind == "magnitude":
            return tuple(size(vector, self.eps) * (1 + v) for v, vector in zip(v_rV, vectors, strict=True))
        return v_rV


def size(vector_D: Tensor, eps: float) -> Tensor:
    """sqrt(|h|^2 + eps^2), (..., 1) in fp32 or wider: |h| with a defined gradient at 0."""
    wide = vector_D.to(accumulation_dtype(vector_D.dtype))
    return (wide.square().sum(-1, keepdim=True) + eps * eps).sqrt()


class BranchWrite(nn.Module):
    """w_h (..., V), 1 + W c, for rules that write h w_h^T (docs/method.md#rules).

    With `plain_start` 1 + W c / sqrt(D), W = 0 at the start: an optimiser that moves every number by the learning rate
    moves W c by up to D times that, at rates that suit the branches a loud multiplier of what they write.
    """

    def __init__(self, config: ResidualConfig, dim: int, std: float) -> None:
        super().__init__()
        self.map = Linear(dim, config.value_channels, std=0.0 if config.plain_start else std)
        self.share = 1 / math.sqrt(dim) if config.plain_start else 1.0

    def linear_map(self) -> tuple[Tensor, Tensor]:
        """Weights (V, D) and biases (V) of v with w_h = 1 + share v as a linear map of c."""
        weight = self.map.weight
        return weight, weight.new_zeros(len(weight))

    def forward(self, c_D: Tensor) -> Tensor:
        change_V: Tensor = self.map(c_D)
        return 1 + (change_V if self.share == 1 else self.share * change_V)


class ChannelWrite(nn.Module):
    """k (..., V) and w (..., 1) of the rule `channels` (docs/method.md#across-value-channels).

    k = u / max(|u|, eps) of u = 1 + tanh(W_k c), w = sqrt(V) (1 + tanh(W_w c)), in fp32 or wider; W_k and W_w, the last
    row of the map, start at 0, so that k w = 1. Below eps k is u / eps: 0 at u = 0, with the derivative 1 / eps.
    """

    def __init__(self, config: ResidualConfig, dim: int) -> None:
        super().__init__()
        self.channels, self.eps = config.value_channels, config.direction_eps
        self.map = Linear(dim, self.channels + 1, std=0.0, precise=True)

    def forward(self, c_D: Tensor) -> tuple[Tensor, Tensor]:
        factors = 1 + torch.tanh(self.map(c_D))
        k_V = F.normalize(factors[..., : self.channels], dim=-1, eps=self.eps)
        return k_V, math.sqrt(self.channels) * factors[..., self.channels :]

"""Where the gate beta in [0, 2] comes from (docs/method.md#gate).

Shapes: V value channels, r rank; c the normed input of the branch.
"""

import math

import torch
from torch import Generator, Tensor, nn

from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.linear import Initialised, Linear
from deepdelta.ops import accumulation_dtype


def gate_logit(beta: float) -> float:
    """The g with 2 sigmoid(g) = beta, beta in (0, 2)."""
    share = beta / 2
    return math.log(share) - math.log1p(-share)


class Gate(Initialised):
    """beta = 2 sigmoid(g(c)): g linear, or two layers with tanh between; or a constant. Logits in fp32 or wider.

    Where the rule starts plain, a 2 sigmoid(g(c)), the learned number a starting at 0.
    """

    weight_decay_exempt = True

    def __init__(self, config: ResidualConfig, dim: int, std: float, beta_start: float) -> None:
        super().__init__()
        self.rank, self.beta_start = config.rank, beta_start
        self.outputs = config.rank * (config.value_channels if config.gate_per_channel else 1)
        if config.gate != "constant":
            bias = gate_logit(beta_start)
        if config.gate == "two_layer":
            hidden_bias = 0.0 if config.gate_hidden_bias else None
            self.inner = Linear(dim, config.gate_hidden, std=std, bias=hidden_bias, precise=True)
            self.outer = Linear(config.gate_hidden, self.outputs, std=std, bias=bias, precise=True)
        elif config.gate == "linear":
            self.outer = Linear(dim, self.outputs, std=std, bias=bias, precise=True)
        self.kind = config.gate
        self.opening = nn.Parameter(torch.empty(1)) if config.starts_plain else None

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.zero_()

    def forward(self, c_D: Tensor) -> tuple[Tensor, ...]:
        """One beta per rank: (..., 1), or (..., V) per value channel."""
        if self.kind == "constant":
            wide = accumulation_dtype(c_D.dtype)
            beta = torch.full((*c_D.shape[:-1], self.rank), self.beta_start, dtype=wide, device=c_D.device)
        else:
            logits = self.outer(torch.tanh(self.inner(c_D)) if self.kind == "two_layer" else c_D)
            beta = 2 * torch.sigmoid(logits)
        if self.opening is not None:
            beta = self.opening.to(beta.dtype) * beta
        return beta.chunk(self.rank, dim=-1)

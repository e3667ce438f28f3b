"""Where the gate beta in [0, R] comes from, R 2 or 1 (docs/method.md#gate).

Shapes: V value channels, r rank; c the normed input of the branch.
"""

import math

import torch
from torch import Generator, Tensor, nn

from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.linear import Initialised, Linear
from deepdelta.ops import accumulation_dtype


def gate_logit(beta: float, most: int = 2) -> float:
    """The g with R sigmoid(g) = beta, beta in (0, R), R `most`."""
    share = beta / most
    return math.log(share) - math.log1p(-share)


class Gate(Initialised):
    """beta = R sigmoid(g(c)): g linear, or two layers with tanh between; or a constant. Logits in fp32 or wider.

    Where the rule starts plain, a R sigmoid(g(c)), the learned number a starting at 0.
    """

    weight_decay_exempt = True

    def __init__(self, config: ResidualConfig, dim: int, std: float, beta_start: float) -> None:
        super().__init__()
        self.rank, self.beta_start = config.rank, beta_start
        self.outputs, self.range = config.rank * config.gates, config.gate_range
        if config.gate != "constant":
            bias = gate_logit(beta_start, self.range)
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
        """One beta per rank: (..., 1), (..., V) per value channel, or one per block."""
        if self.kind == "constant":
            wide = accumulation_dtype(c_D.dtype)
            beta = torch.full((*c_D.shape[:-1], self.outputs), self.beta_start, dtype=wide, device=c_D.device)
        else:
            logits = self.outer(torch.tanh(self.inner(c_D)) if self.kind == "two_layer" else c_D)
            beta = self.range * torch.sigmoid(logits)
        if self.opening is not None:
            beta = self.opening.to(beta.dtype) * beta
        return beta.chunk(self.rank, dim=-1)

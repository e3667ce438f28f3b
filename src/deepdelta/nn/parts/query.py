"""What the state says when it is asked by key (docs/method.md#asked-by-key): the read that belongs to a write along k.

Shapes: V value channels, D compute width; c the branch's input after the norm.
"""

import torch
from torch import Generator, Tensor

from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.linear import Initialised, Linear
from deepdelta.ops import accumulation_dtype, without_autocast


class Query(Initialised):
    """W_r (X q), (..., D), with q = W_q c / sqrt(|W_q c|^2 + eps^2); X q has one number per value channel.

    W_r starts at 0, so nothing is added at the start; W_q is drawn. q and X q are made in fp32 or wider.
    """

    weight_decay_exempt = True

    def __init__(self, config: ResidualConfig, dim: int, std: float) -> None:
        super().__init__()
        self.eps = config.direction_eps
        self.key = Linear(dim, dim, std=std, precise=True)
        self.answer = Linear(config.value_channels, dim, std=0.0)

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        raise AssertionError("its maps start themselves")

    def forward(self, state_VD: Tensor, c_D: Tensor) -> Tensor:
        key_D = self.key(c_D)
        q_D = key_D / (key_D.square().sum(-1, keepdim=True) + self.eps**2).sqrt()
        with without_autocast(state_VD.device):
            wide_VD = state_VD.to(accumulation_dtype(state_VD.dtype))
            said_V = torch.matmul(wide_VD, q_D.to(wide_VD.dtype).unsqueeze(-1)).squeeze(-1)
        answer_D: Tensor = self.answer(said_V.to(c_D.dtype))
        return answer_D

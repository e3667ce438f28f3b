"""What the state says when it is asked by key (docs/method.md#asked-by-key): the read that belongs to a write along k.

Shapes: V value channels, D compute width; c the branch's input after the norm.
"""

from typing import Any

import torch
from torch import Tensor, nn

from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.linear import Linear
from deepdelta.nn.parts.target import size
from deepdelta.ops import accumulation_dtype, without_autocast


class Query(nn.Module):
    """W_r (X q), (..., D), with q = W_q c / sqrt(|W_q c|^2 + eps^2); X q has one number per value channel.

    W_r starts at 0, so nothing is added at the start; W_q is drawn. q and X q are made in fp32 or wider.
    """

    weight_decay_exempt = True

    def __init__(self, config: ResidualConfig, dim: int, std: float) -> None:
        super().__init__()
        self.eps = config.direction_eps
        self.question = Linear(dim, dim, std=std, precise=True)
        self.answer = Linear(config.value_channels, dim, std=0.0)

    def forward(self, state_VD: Tensor, c_D: Tensor) -> Tensor:
        asked_D = self.question(c_D)
        q_D = asked_D / size(asked_D, self.eps)
        narrow = accumulation_dtype(state_VD.dtype) != state_VD.dtype
        with without_autocast(state_VD.device):
            said_V: Tensor = (_WideRead.apply if narrow else _read)(state_VD, q_D)
        answer_D: Tensor = self.answer(said_V.to(c_D.dtype))
        return answer_D


def _read(state_VD: Tensor, q_D: Tensor) -> Tensor:
    return torch.matmul(state_VD, q_D.to(state_VD.dtype).unsqueeze(-1)).squeeze(-1)


class _WideRead(torch.autograd.Function):
    """X q in fp32 of a narrower state, which is kept for the backward pass as it is: a wide copy would take twice its
    room, and memory plans could not put anything in its place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state_VD: Tensor, q_D: Tensor) -> Tensor:
        return _read(state_VD.to(q_D.dtype), q_D)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_V: Tensor) -> tuple[Tensor, Tensor]:
        state_VD, q_D = ctx.saved_tensors
        of_q_D = torch.matmul(grad_V.unsqueeze(-2), state_VD.to(q_D.dtype)).squeeze(-2)
        return (grad_V.unsqueeze(-1) * q_D.unsqueeze(-2)).to(state_VD.dtype), of_q_D

"""Layers that the small networks of tasks and benchmarks share.

Shapes: B batch, T patches, D width, C channels, H height, W width.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Multi-head attention over all patches."""

    def __init__(self, dim: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(dim, 3 * dim, bias=bias)
        self.outward = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.inward(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed: Tensor = self.outward(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return mixed


class ChannelNorm(nn.RMSNorm):
    """RMSNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)

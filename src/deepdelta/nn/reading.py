"""How a sublayer reads the state: compress, then norm; and what of that a fused step can do in its own pass.

Shapes: V value channels, D compute width; `...` any leading axes.
"""

from typing import NamedTuple

from torch import Tensor, nn

from deepdelta.nn.compression import ChannelCompression, ChannelConvolution, FoldedChannels, Squeeze
from deepdelta.nn.linear import RMSNorm
from deepdelta.nn.plain import plain


class Opened(NamedTuple):
    """A state on its way into a branch."""

    state: Tensor
    """X, (..., V, D)."""
    x_in: Tensor | None
    """The compressed state, (..., D); None where a fused step did not keep it."""
    c: Tensor
    """What the branch and the gate see, (..., D)."""


class Folded(NamedTuple):
    """A reading as the numbers that a fused step takes: c = RMSNorm(sum_j C_j * X_j), weight None without a norm."""

    compression: Tensor | None
    weight: Tensor | None
    eps: float


class Reading(NamedTuple):
    """The compression and the norm before a branch, or before the head."""

    compression: nn.Module
    norm: nn.Module
    needs_x_in: bool = False

    def open(self, state_VD: Tensor) -> Opened:
        x_in_D = self.compression(state_VD)
        return Opened(state_VD, x_in_D, self.norm(x_in_D))

    def folded(self) -> Folded | None:
        """None where a fused step cannot do it: over tokens, where x_in itself is needed, or modules that are not
        plainly ours."""
        if self.needs_x_in or not plain(self.norm, RMSNorm, nn.Identity):
            return None
        weight, eps = (self.norm.weight, self.norm.eps) if isinstance(self.norm, RMSNorm) else (None, 0.0)
        if not plain(self.compression, Squeeze, ChannelCompression, ChannelConvolution, FoldedChannels):
            return None
        if isinstance(self.compression, Squeeze):
            return Folded(None, weight, eps)
        assert isinstance(self.compression, ChannelCompression | ChannelConvolution | FoldedChannels)
        return Folded(self.compression.folded(), weight, eps)

"""How a sublayer reads the state: compress, then norm; and what of that a fused step can do in its own pass.

Shapes: V value channels, D compute width; `...` any leading axes.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from deepdelta.nn.activation_memory import SavedState
from deepdelta.nn.linear import RMSNorm
from deepdelta.nn.parts.compression import ChannelCompression, ChannelConvolution, Squeeze
from deepdelta.nn.plain import plain


class StreamState(NamedTuple):
    """A state on its way from residual to residual, with what the next branch reads of it."""

    state: Tensor
    """X, (..., V, D)."""
    saved: SavedState | None = None
    """What is saved for the backward pass in place of X; None where X itself is."""
    x_in: Tensor | None = None
    """The compressed state, (..., D); None where a fused step did not keep it."""
    c: Tensor | None = None
    """What the branch and the gate see, (..., D); None before an input map has read the state."""

    def read(self) -> Tensor:
        """c, of a state that an input map has read."""
        assert self.c is not None
        return self.c


class InputWeights(NamedTuple):
    """An input map as the numbers that a fused step takes: c = RMSNorm(sum_j C_j * X_j), weight None without a norm."""

    compression: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0


class InputMap(NamedTuple):
    """The compression and the norm before a branch, or before the head."""

    compression: nn.Module
    norm: nn.Module
    needs_x_in: bool = False
    one_token: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None
    """In cached decoding what does the rewrite before this map and, where it can, this map (else None): (X, h, c) ->
    (X', c')."""

    def __call__(self, given: StreamState) -> StreamState:
        x_in_D = self.compression(given.state)
        return given._replace(x_in=x_in_D, c=self.norm(x_in_D))

    def weights(self) -> InputWeights | None:
        """None where a fused step cannot do it: over tokens, where x_in itself is needed, or modules that are not
        plainly ours."""
        if self.needs_x_in or not plain(self.compression, Squeeze, ChannelCompression, ChannelConvolution):
            return None
        assert isinstance(self.compression, Squeeze | ChannelCompression | ChannelConvolution)
        if plain(self.norm, RMSNorm):
            return InputWeights(self.compression.folded(), self.norm.weight, self.norm.eps)
        return InputWeights(self.compression.folded()) if plain(self.norm, nn.Identity) else None

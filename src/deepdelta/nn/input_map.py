"""How a sublayer reads the state: compress, norm, ask by key; and what of that a fused step can do in its own pass.

Shapes: V value channels, D compute width; `...` any leading axes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepdelta.nn.activation_memory import SavedState
from deepdelta.nn.norms import rms_scale
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
    """What a fused step can do of an input map, as the numbers that it takes: RMSNorm(sum_j C_j * X_j), or the sum."""

    compression: Tensor | None = None
    weight: Tensor | None = None
    """Of the norm; None: the sum alone."""
    eps: float = 0.0


@dataclass
class InputMap:
    """The compression, the norm and, where it has one, the query before a branch; the first two before the head.

    No tuple: accelerate, which moves the tensors in what its modules are called with, would look into it.
    """

    compression: nn.Module
    norm: nn.Module
    needs_x_in: bool = False
    query: nn.Module | None = None
    """What the state is asked by key, given the state and what the norm made of it; its answer is added to that."""
    one_token: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None
    """In cached decoding what does the rewrite before this map and, where it can, this map (else None): (X, h, c) ->
    (X', c')."""

    def __call__(self, given: StreamState) -> StreamState:
        x_in_D = self.compression(given.state)
        return self.asked(given._replace(x_in=x_in_D, c=self.norm(x_in_D)))

    def asked(self, given: StreamState) -> StreamState:
        """With the answer of the query, if there is one, added to c."""
        if self.query is None:
            return given
        c_D = given.read()
        return given._replace(c=c_D + self.query(given.state, c_D))

    def weights(self, dtype: torch.dtype) -> InputWeights | None:
        """Of what a fused step can do; None where that is nothing: over tokens, with a compression that is not plainly
        ours, or where there is none and no RMSNorm that it knows."""
        if not plain(self.compression, Squeeze, ChannelCompression, ChannelConvolution):
            return None
        assert isinstance(self.compression, Squeeze | ChannelCompression | ChannelConvolution)
        scale = None if self.needs_x_in else rms_scale(self.norm, dtype)
        compression = self.compression.folded()
        if scale is None:
            return None if compression is None else InputWeights(compression)
        return InputWeights(compression, *scale)

    def opened(self, given: StreamState, weights: InputWeights, made: Tensor) -> StreamState:
        """The state, read with what a fused step `made` with these weights of this map."""
        if weights.weight is not None:
            return self.asked(given._replace(c=made))
        return self.asked(given._replace(x_in=made, c=self.norm(made)))

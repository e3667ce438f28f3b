"""What a causal convolution over tokens remembers between calls, for cached decoding.

Shapes: B batch, T new tokens, K taps, V value channels, D compute width.
"""

import torch
from torch import Tensor, nn

from deepdelta.nn.parts.compression import convolve_last


class History:
    """The last K - 1 inputs of a causal convolution over tokens, (B, K - 1, ...); zeros stand before the first.

    Args:
        values: the zeros to begin with; what follows is written into this tensor.
        padding_B: how many inputs at the start of each row are padding, which the convolution takes as zeros too.
    """

    def __init__(self, values: Tensor, padding_B: Tensor | None = None) -> None:
        self.values, self.padding_B = values, padding_B
        self.padded = 0 if padding_B is None else int(padding_B.max())
        self.seen = 0

    def extend(self, new: Tensor) -> Tensor:
        """The K - 1 inputs before `new` (B, T, ...) and `new` itself, (B, K - 1 + T, ...); the last K - 1 are kept."""
        tokens = new.shape[1]
        if self.seen < self.padded:
            assert self.padding_B is not None
            slots_T = torch.arange(self.seen, self.seen + tokens, device=new.device)
            pads_BT = slots_T < self.padding_B[:, None]
            new = new.masked_fill(pads_BT.view(*pads_BT.shape, *[1] * (new.ndim - 2)), 0.0)
        self.seen += tokens
        if not self.values.shape[1]:
            return new
        window = torch.cat((self.values, new.to(self.values.dtype)), 1)
        # A copy: a view would keep the whole window alive.
        self.values.copy_(window[:, tokens:])
        return window

    def clear(self) -> None:
        self.values.zero_()
        self.seen = 0


class FoldedTokens(nn.Module):
    """A compression over tokens with its weight (V, D, K) as it was when this was made, and its history."""

    weight: Tensor

    def __init__(self, weight_VDK: Tensor, history: History) -> None:
        super().__init__()
        self.register_buffer("weight", weight_VDK)
        self.history = history

    def forward(self, state_BTVD: Tensor) -> Tensor:
        return convolve_last(self.history.extend(state_BTVD), state_BTVD.shape[1], self.weight)


class Remembering(nn.Module):
    """A compression over tokens that is called as it is, with its history: for one that has hooks, or weights that are
    made anew in each call."""

    def __init__(self, compression: nn.Module, history: History) -> None:
        super().__init__()
        # Held in a tuple: it stays the model's own.
        self._compression, self.history = (compression,), history

    def forward(self, state_BTVD: Tensor) -> Tensor:
        return self._compression[0](state_BTVD, self.history.extend)  # type: ignore[no-any-return]

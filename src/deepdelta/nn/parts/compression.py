"""From a state of V value channels to one vector per token (docs/method.md#compression): linear in the state.

Shapes: B batch, T tokens, V value channels, D compute width, K taps.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.nn.backend import Backend, Work, described, runs_fused
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.linear import Initialised
from deepdelta.ops import without_autocast
from deepdelta.ops.convolution import compress_tokens

Reduce = Literal["learned", "sum", "mean"]


class Squeeze(nn.Module):
    """`channel` at V = 1: the one value channel is the vector."""

    def folded(self) -> None:
        """No weights."""

    def forward(self, state_VD: Tensor) -> Tensor:
        return state_VD.squeeze(-2)


class Pool(nn.Module):
    """The sum or the mean over the value channels: a readout without weights."""

    def __init__(self, kind: Reduce) -> None:
        super().__init__()
        self.kind = kind

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, state_VD: Tensor) -> Tensor:
        return state_VD.sum(-2) if self.kind == "sum" else state_VD.mean(-2)


class ChannelCompression(Initialised):
    """x_in = sum_j C[j, :] * X[j, :], one weight per value channel and feature, starting at the mean (C = 1/V).

    Where the rule starts plain, in pairs of value channels, feature by feature, 0.5/V and 1.5/V: on channels that are
    equal it is the mean all the same, but each has gradients of its own, without which they would stay equal.
    """

    weight_decay_exempt = True

    def __init__(self, config: ResidualConfig, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.value_channels, dim))
        self.paired = config.starts_plain

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(1 / parameter.shape[0])
        if self.paired:
            half, width = parameter.shape[0] // 2, parameter.shape[1]
            swing = torch.randint(0, 2, (half, width), generator=generator, device=parameter.device) - 0.5
            parameter[:half] *= 1 + swing
            parameter[half : 2 * half] *= 1 - swing

    def folded(self) -> Tensor:
        """C, (V, D)."""
        return self.weight

    def forward(self, state_VD: Tensor) -> Tensor:
        return (state_VD * self.weight.to(state_VD.dtype)).sum(-2)


class ConvolutionCompression(Initialised):
    """What the two convolutional forms share: weights (D, ...) that start as the identity or at random, and a read
    vector r in R^V that sums the V outputs. It starts at 1/V; where the rule starts plain and the weights as the
    identity in pairs of 0.5/V and 1.5/V (as `ChannelCompression` does)."""

    weight_decay_exempt = True

    def __init__(self, config: ResidualConfig, shape: tuple[int, ...], identity_tap: int, std: float) -> None:
        super().__init__()
        self.identity_tap = None if config.compression_init == "random" else identity_tap
        self.std, self.paired = std, config.starts_plain and self.identity_tap is not None
        self.weight = nn.Parameter(torch.empty(shape))
        self.read = nn.Parameter(torch.empty(config.value_channels))

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "read":
            parameter.fill_(1 / parameter.shape[0])
            if self.paired:
                half = parameter.shape[0] // 2
                parameter[:half] *= 0.5
                parameter[half : 2 * half] *= 1.5
        elif self.identity_tap is None:
            parameter.normal_(0.0, self.std, generator=generator)
        else:
            parameter.zero_()
            parameter[..., self.identity_tap] = 1.0


class ChannelConvolution(ConvolutionCompression):
    """The authors' code's channel compression: a convolution along the value channels (weight D x K), then the read.

    Linear in X with no mixing of features, so it is applied as the one weight per channel and feature that it
    collapses to: C[j, :] = sum_i r_i weight[:, j - i + left].
    """

    def __init__(self, config: ResidualConfig, dim: int, std: float) -> None:
        taps = config.compression_kernel
        self.left = taps - 1 if config.compression_causal else (taps - 1) // 2
        super().__init__(config, (dim, taps), self.left, std)

    def folded(self) -> Tensor:
        """C, (V, D)."""
        channels, taps = self.read.shape[0], self.weight.shape[1]
        padded = F.pad(self.read, (taps, taps))
        # Tap k of input channel j feeds output channel j + left - k, which the read vector weighs (0 outside).
        reads_KV = torch.stack([padded[taps + self.left - k :][:channels] for k in range(taps)])
        with without_autocast(self.weight.device):
            return (self.weight @ reads_KV).T

    def forward(self, state_VD: Tensor) -> Tensor:
        return (state_VD * self.folded().to(state_VD.dtype)).sum(-2)


class TokenConvolution(ConvolutionCompression):
    """Per value channel and feature a causal depthwise convolution over tokens, then the read vector."""

    def __init__(self, config: ResidualConfig, dim: int, std: float) -> None:
        taps = config.compression_kernel
        super().__init__(config, (config.value_channels, dim, taps), taps - 1, std)
        self.backend: Backend = "auto"
        """Whether `ops.convolution` does it; see `use_backend`."""
        self.work = Work(config.value_channels, dim, convolves=True)

    def extra_repr(self) -> str:
        return f"backend={described(self.backend, self.work, self.weight)}"

    def folded(self) -> Tensor:
        """r_j weight[j, :, :], (V, D, K)."""
        return self.weight * self.read[:, None, None]

    def forward(self, state_BTVD: Tensor, extend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Nothing came before the tokens, or what `extend` sets before them: the states of the K - 1 before."""
        if extend is not None:
            return convolve_last(extend(state_BTVD), state_BTVD.shape[1], self.folded())
        channels, width, taps = self.weight.shape
        batch, tokens = state_BTVD.shape[:-3], state_BTVD.shape[-3]
        if tokens == 0:
            # PyTorch has no convolution of nothing; this has the shape and the gradients of one.
            return (state_BTVD * self.folded()[..., -1].to(state_BTVD.dtype)).sum(-2)
        if runs_fused(self.backend, self.work, state_BTVD, state_BTVD.numel()):
            state_NTVD = state_BTVD.reshape(-1, tokens, channels, width)
            return compress_tokens(state_NTVD, self.folded()).view(*batch, tokens, width)
        x_NCT = F.pad(_by_feature(state_BTVD.reshape(-1, tokens, channels, width)), (taps - 1, 0))
        return _convolved(x_NCT, self.folded()).view(*batch, tokens, width)


def _by_feature(state_NTVD: Tensor) -> Tensor:
    """(N, D * V, T): one group per feature with V inputs and one output, so that the convolution sums over V too."""
    tokens, channels, width = state_NTVD.shape[1:]
    return state_NTVD.permute(0, 3, 2, 1).reshape(-1, width * channels, tokens)


def _convolved(x_NCT: Tensor, weight_VDK: Tensor) -> Tensor:
    """(N, T - K + 1, D) of T tokens."""
    weight = weight_VDK.transpose(0, 1).to(x_NCT.dtype)
    with without_autocast(x_NCT.device):
        y_NDT = F.conv1d(x_NCT, weight, groups=weight.shape[0])
    # Not contiguous(): what an exported program does must not depend on the number of tokens.
    return y_NDT.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def convolve_last(x_BKVD: Tensor, tokens: int, weight_VDK: Tensor) -> Tensor:
    """(B, T, D) of the last T tokens, which K - 1 others come before."""
    if not torch.compiler.is_exporting() and tokens == 1:  # an exported program has any number
        # For one token the convolution costs more in its set-up than in its sums.
        return (x_BKVD * weight_VDK.permute(2, 0, 1)).sum((1, 2)).unsqueeze(1)
    return _convolved(_by_feature(x_BKVD), weight_VDK)


def build_compression(config: ResidualConfig, dim: int, std: float) -> nn.Module:
    if config.value_channels == 1 and config.compression == "channel":
        return Squeeze()
    if config.compression == "channel":
        return ChannelCompression(config, dim)
    kind = ChannelConvolution if config.compression == "channel_conv" else TokenConvolution
    return kind(config, dim, std)

"""From a vector per token to a state of V value channels (docs/method.md#expansion).

Shapes: B batch, T tokens, V value channels, D compute width, K taps.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.nn.backend import Backend, Work, described, runs_fused
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.linear import Initialised
from deepdelta.ops import without_autocast
from deepdelta.ops.convolution import expand_tokens


class Repeat(nn.Module):
    """Every value channel is the vector itself."""

    def __init__(self, config: ResidualConfig, dim: int) -> None:
        super().__init__()
        self.channels = config.value_channels

    def forward(self, x_D: Tensor) -> Tensor:
        if self.channels == 1:
            return x_D.unsqueeze(-2)
        return x_D.unsqueeze(-2).expand(*x_D.shape[:-1], self.channels, x_D.shape[-1])


class EmbeddingConvolution(Initialised):
    """Depthwise causal convolution over tokens from D to V x D, starting as `Repeat`: last tap 1, the others 0."""

    weight_decay_exempt = True

    def __init__(self, config: ResidualConfig, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.value_channels, dim, config.expansion_kernel))
        self.backend: Backend = "auto"
        """Whether `ops.convolution` does it; see `use_backend`."""
        self.work = Work(config.value_channels, dim, convolves=True)

    def extra_repr(self) -> str:
        return f"backend={described(self.backend, self.work, self.weight)}"

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.zero_()
        parameter[..., -1] = 1.0

    def forward(self, x_BTD: Tensor, extend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The tokens' states; nothing came before them, or what `extend` sets before them: the K - 1 before."""
        channels, width, taps = self.weight.shape
        batch, tokens = x_BTD.shape[:-2], x_BTD.shape[-2]
        if tokens == 0:
            # PyTorch has no convolution of nothing; this has the shape and the gradients of one.
            return x_BTD.unsqueeze(-2) * self.weight[..., -1].to(x_BTD.dtype)
        if extend is None and runs_fused(self.backend, self.work, x_BTD, channels * x_BTD.numel()):
            return expand_tokens(x_BTD.reshape(-1, tokens, width), self.weight).view(*batch, tokens, channels, width)
        if extend is None:
            x_NDT = F.pad(x_BTD.reshape(-1, tokens, width).transpose(-1, -2), (taps - 1, 0))
        else:
            x_BKD = extend(x_BTD)
            if not torch.compiler.is_exporting() and tokens == 1:  # an exported program has any number
                # For one token the convolution costs more in its set-up than in its sums.
                weight_VKD = self.weight.transpose(1, 2).to(x_BTD.dtype)
                return (x_BKD.unsqueeze(1) * weight_VKD).sum(2).unsqueeze(1)
            x_NDT = x_BKD.transpose(-1, -2)
        weight = self.weight.transpose(0, 1).reshape(width * channels, 1, taps).to(x_BTD.dtype)
        # Autocast would hand the convolution bf16, and with it the whole state.
        with without_autocast(x_BTD.device):
            y_NDVT = F.conv1d(x_NDT, weight, groups=width).reshape(-1, width, channels, tokens)
        # Contiguous once here: else the strange strides go along through every layer.
        y_NTVD = y_NDVT.permute(0, 3, 2, 1).clone(memory_format=torch.contiguous_format)
        return y_NTVD.view(*batch, tokens, channels, width)


def build_expansion(config: ResidualConfig, dim: int) -> Repeat | EmbeddingConvolution:
    return Repeat(config, dim) if config.expansion == "repeat" else EmbeddingConvolution(config, dim)

"""The embedding convolution on the CPU as an operator that torch.compile and autograd know.

Shapes: B batch, T tokens, V value channels, D width, K taps.
"""

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deepdelta.ops.precision import accumulation_dtype


def expand_tokens(x: Float[Tensor, "B T D"], weight: Float[Tensor, "V D K"]) -> Float[Tensor, "B T V D"]:
    """y_t = sum_k W_k * x_{t-K+1+k}, W_k (V, D), tokens before the first being 0: section 2, embedding convolution.

    x and y have one dtype; weights and sums are fp32, or fp64 for an fp64 x. On the CPU, by numba: ask
    `ops.step.fused_problem` first whether that can run.
    """
    weight_VKD = weight.to(accumulation_dtype(x.dtype)).transpose(1, 2).contiguous()
    y: Tensor = convolve(x.contiguous(), weight_VKD)
    return y


def _code() -> Any:
    return importlib.import_module("deepdelta.ops.convolution.cpu")


@torch.library.custom_op("deepdelta::expand_tokens", mutates_args=(), device_types="cpu")
def convolve(x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0], x.shape[-1])
    _code().forward(x, weight, y)
    return y


@torch.library.custom_op("deepdelta::expand_tokens_backward", mutates_args=(), device_types="cpu")
def convolve_backward(x: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(x)
    return d_x, _code().backward(x, weight, d_y, d_x)


@convolve.register_fake
def _(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0], x.shape[-1])


@convolve_backward.register_fake
def _(x, weight, d_y):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d_y):  # type: ignore[no-untyped-def]
    return convolve_backward(*ctx.saved_tensors, d_y.contiguous())


convolve.register_autograd(_gradients, setup_context=_save)

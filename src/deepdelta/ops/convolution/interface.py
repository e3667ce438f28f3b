"""The convolutions over tokens on the CPU as operators that torch.compile and autograd know.

Shapes: B batch, T tokens, V value channels, D width, K taps. Within the operators x is (B, T, P, D) and y
(B, T, Q, D), one of P and Q being 1 and the other V; weights are (V, K, D).
"""

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deepdelta.ops.derivatives import check_plain
from deepdelta.ops.operators import differentiable, once, operator
from deepdelta.ops.precision import accumulation_dtype


def expand_tokens(x: Float[Tensor, "B T D"], weight: Float[Tensor, "V D K"]) -> Float[Tensor, "B T V D"]:
    """y_t = sum_k W_k * x_{t-K+1+k}, W_k (V, D), tokens before the first being 0 (docs/method.md#expansion).

    x and y have one dtype; weights and sums are fp32, or fp64 for an fp64 x. On the CPU, by numba: ask
    `ops.step.fused_problem` first whether that can run.
    """
    check_plain(x, weight)
    y: Tensor = convolve(x.unsqueeze(2).contiguous(), _by_tap(weight, x), weight.shape[0])
    return y


def compress_tokens(x: Float[Tensor, "B T V D"], weight: Float[Tensor, "V D K"]) -> Float[Tensor, "B T D"]:
    """y_t = sum_k sum_j W_kj * x_{t-K+1+k,j}, W_kj (D), tokens before the first being 0 (docs/method.md#compression).

    Dtypes and code as for `expand_tokens`, whose transpose it is.
    """
    check_plain(x, weight)
    y: Tensor = convolve(x.contiguous(), _by_tap(weight, x), 1)
    return y.squeeze(2)


def _by_tap(weight_VDK: Tensor, x: Tensor) -> Tensor:
    return weight_VDK.to(accumulation_dtype(x.dtype)).transpose(1, 2).contiguous()


def _code() -> Any:
    return importlib.import_module("deepdelta.ops.backends.cpu.convolution")


def _convolve(x: Tensor, weight: Tensor, outputs: int) -> Tensor:
    y = x.new_empty(*x.shape[:2], outputs, x.shape[3])
    _code().forward(x, weight, y)
    return y


def _convolve_backward(x: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(x)
    return d_x, _code().backward(x, weight, d_y, d_x)


def _fake(x: Tensor, weight: Tensor, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:2], outputs, x.shape[3])


def _backward_fake(x: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


_operator = operator("convolve_tokens", "(Tensor x, Tensor weight, SymInt outputs) -> Tensor", _convolve, _fake)
_operator_backward = operator(
    "convolve_tokens_backward",
    "(Tensor x, Tensor weight, Tensor d_y) -> (Tensor, Tensor)",
    _convolve_backward,
    _backward_fake,
)
convolve_backward = once(_operator_backward, _convolve_backward, 1)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx, d_y):  # type: ignore[no-untyped-def]
    return *convolve_backward(*ctx.saved_tensors, d_y.contiguous()), None


convolve = differentiable(_operator, _convolve, _gradients, _save)

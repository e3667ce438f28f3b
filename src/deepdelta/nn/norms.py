"""The RMSNorms that a fused step can do in its own pass: ours, torch's, and those of transformers that are the same."""

import torch
from torch import Tensor, nn

from deepdelta.nn.linear import RMSNorm
from deepdelta.nn.plain import plain
from deepdelta.ops import accumulation_dtype

SAME = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}RMSNorm": "variance_epsilon"
    for name in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Phi3", "Granite")
}
"""Classes by full name (no library need be installed) that compute weight * x / rms(x), in fp32 whatever x is, with the
attribute that holds eps. Others of that name do not: Gemma's scales by 1 + weight."""


def rms_scale(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, float] | None:
    """Weight (D) and eps of a norm that is plainly weight * x / sqrt(mean(x^2) + eps), for x of that dtype."""
    if plain(norm, RMSNorm):
        return norm.weight, norm.eps
    weight: Tensor | None = None
    if plain(norm, nn.RMSNorm):
        weight, eps = norm.weight, torch.finfo(accumulation_dtype(dtype)).eps if norm.eps is None else norm.eps
    elif (attribute := SAME.get(f"{type(norm).__module__}.{type(norm).__qualname__}")) and plain(norm, type(norm)):
        weight, eps = None if dtype == torch.float64 else getattr(norm, "weight", None), getattr(norm, attribute)
    # Of another dtype than x, it decides the dtype of what comes out.
    return None if weight is None or weight.ndim != 1 or weight.dtype != dtype else (weight, eps)

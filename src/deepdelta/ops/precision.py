"""In which precision reductions and gate logits are computed."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower: sums over a width of hundreds lose digits in bf16 and fp16."""
    return torch.float64 if dtype == torch.float64 else torch.float32

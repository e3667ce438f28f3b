"""The rewrite in plain PyTorch: readable, fp32 or wider inside, rounded to the state's dtype once at the end.

Shapes: V value channels, D compute width, N all leading axes (batch, token) as one.
"""

import torch
from torch import Tensor

from deepdelta.ops.precision import accumulation_dtype, without_autocast


def read_along(state: Tensor, direction: Tensor) -> Tensor:
    """k^T X: state (..., V, D) read along direction (..., D), as (..., V) in fp32 or wider."""
    wide = accumulation_dtype(state.dtype)
    state_VD, direction_D = state.to(wide), direction.to(wide)
    if state.shape[-2] == 1:
        # A batched product of 1 x D by D x 1 costs more in calls than in arithmetic.
        return (state_VD * direction_D.unsqueeze(-2)).sum(-1)
    # Autocast would hand a batched product bf16.
    with without_autocast(state.device):
        return (state_VD @ direction_D.unsqueeze(-1)).squeeze(-1)


def rewrite(
    state: Tensor, direction: Tensor, write: Tensor | float, erase: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """X + k (w^T - b k^T X), and the read k^T X (None without an erase term)."""
    wide = accumulation_dtype(state.dtype)
    read_V = None if erase is None else read_along(state, direction)
    if not isinstance(write, Tensor) and read_V is None:
        return torch.add(state, direction.unsqueeze(-2), alpha=write).to(state.dtype), None
    coefficient_V = write.to(wide) if isinstance(write, Tensor) else write
    if erase is not None and read_V is not None:
        coefficient_V = coefficient_V - erase.to(wide) * read_V
    assert isinstance(coefficient_V, Tensor)
    channels, width = state.shape[-2:]
    if channels == 1:
        new_VD = torch.addcmul(state.to(wide), coefficient_V.unsqueeze(-1), direction.to(wide).unsqueeze(-2))
        return new_VD.to(state.dtype), read_V
    # One batched outer product that adds as it goes: a third faster than forming k c^T and adding it.
    with without_autocast(state.device):
        new_NVD = torch.baddbmm(
            state.to(wide).reshape(-1, channels, width),
            coefficient_V.reshape(-1, channels, 1),
            direction.to(wide).reshape(-1, 1, width),
        )
    return new_NVD.reshape(state.shape).to(state.dtype), read_V

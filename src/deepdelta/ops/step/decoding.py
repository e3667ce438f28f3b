"""The fused step for decoding on the CPU: the gate and the target are computed in its pass too, so that one call does
what takes some twenty small operations otherwise, each of which costs more to call than to compute.

Shapes: N rows of one token each, V value channels, D width, G gates.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepdelta.ops.step.reference import Normalise

DTYPES = (torch.float32, torch.float64)


class DecodingStep:
    """(X', c') of one token per row from X, h and c: `rewrite_step` with b = 2 sigmoid(G c + g), w = b (W c).

    Args:
        rows, channels, width: N, V and D.
        dtype: of every tensor, fp32 or fp64.
        gate: G (1 or V, D) and g (1 or V); None: w = 1 along h as it is, and no erase.
        target: W (V, D); None with a gate: w = 0.
        erases: whether b is used for the erase; else it only scales w.
        compression, norm_weight, norm_eps, opens: as for `fused_step`.

    No derivatives. The weights are used where they lie.
    """

    def __init__(
        self,
        rows: int,
        channels: int,
        width: int,
        dtype: torch.dtype,
        *,
        gate: tuple[Tensor, Tensor] | None,
        target: Tensor | None,
        erases: bool,
        normalise: Normalise,
        compression: Tensor | None,
        norm_weight: Tensor | None,
        norm_eps: float,
        opens: bool,
    ) -> None:
        assert dtype in DTYPES and (gate is not None or not erases) and (normalise.offset is not None or gate is None)
        # Imported here: numba is an extra.
        from deepdelta.ops.step import cpu_kernel

        one = np.float64(1) if dtype == torch.float64 else np.float32(1)
        number = type(one)
        weight, bias = gate or (None, None)
        self.dtype, self.opens, self._kernel, self._one = dtype, opens, cpu_kernel.decode, one
        offset = None if gate is None or normalise.offset is None else number(normalise.offset)
        self._parameters = (
            *(_array(tensor) for tensor in (weight, bias, target)),
            offset,
            0 if gate is None else normalise.power,
            *(_array(tensor) if opens else None for tensor in (compression, norm_weight)),
            number(norm_eps),
            np.empty((rows, channels), one.dtype),
            np.empty((rows, 1 if weight is None else weight.shape[0]), one.dtype) if erases else None,
        )
        self._scratch = [np.empty(shape, one.dtype) for shape in ((rows,), (rows, channels), (rows,), (rows, channels))]

    def __call__(self, state: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        state, h, c = (tensor.to(self.dtype).contiguous() for tensor in (state, h, c))
        new, c_new = torch.empty_like(state), torch.empty_like(c) if self.opens else None
        filled = new.numpy(), None if c_new is None else c_new.numpy()
        self._kernel(self._one, state.numpy(), h.numpy(), c.numpy(), *self._parameters, *filled, *self._scratch)
        return new, c_new


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().contiguous().numpy()

"""The fused step for decoding on the CPU: the gate and the target are computed in its pass too, so that one call does
what takes some twenty small operations otherwise, each of which costs more to call than to compute.

Shapes: N rows of one token each, V value channels, D width, G gates.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepdelta.ops.step.reference import Gating, Normalise

DTYPES = (torch.float32, torch.float64)


class DecodingStep:
    """(X', c') of one token per row from X, h and c: `rewrite_step` with w and b of the gating M c + m.

    Args:
        rows, channels, width: N, V and D.
        dtype: of every tensor, fp32 or fp64.
        maps: M (G, D) or (G + V, D) and m (G) or (G + V); None: w = 1 along h as it is, and no erase.
        gating: with maps what becomes of its numbers, for which its own stand; else None.
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
        maps: tuple[Tensor, Tensor] | None,
        gating: Gating | None,
        normalise: Normalise,
        compression: Tensor | None,
        norm_weight: Tensor | None,
        norm_eps: float,
        opens: bool,
    ) -> None:
        assert (
            dtype in DTYPES and ((maps is None) == (gating is None)) and (maps is None or normalise.offset is not None)
        )
        # Imported here: numba is an extra.
        from deepdelta.ops.backends.cpu.kept import announced
        from deepdelta.ops.backends.cpu.kernels import decode

        one = np.float64(1) if dtype == torch.float64 else np.float32(1)
        self.dtype, self.opens, self._kernel = dtype, opens, decode
        self._state_shape, self._vector_shape = (rows, channels, width), (rows, width)

        def empty(*shape: int) -> Any:
            return np.empty(shape, one.dtype)

        weights, bias = (None, None) if maps is None else map(_array, maps)
        beta = None if gating is None else empty(rows, gating.gates)
        compression_, norm_weight_ = (_array(tensor) if opens else None for tensor in (compression, norm_weight))
        arguments = dict(
            one=one,
            weights=weights,
            bias=bias,
            gating=None if weights is None else empty(rows, len(weights)),
            factor=None if gating is None else _array(gating.factor),
            share=None if gating is None or gating.share is None else type(one)(gating.share),
            beta=beta,
            write=np.ones((rows, channels), one.dtype),
            erase=beta if gating is not None and gating.erases else None,
            offset=None if maps is None else type(one)(normalise.offset),
            power=0 if maps is None else normalise.power,
            compression=compression_,
            norm_weight=norm_weight_,
            norm_eps=type(one)(norm_eps),
            scale=empty(rows),
            read=empty(rows, channels),
            inverse=empty(rows),
            coefficient=empty(rows, channels),
        )
        names = list(inspect.signature(decode.py_func).parameters)
        changing = ("state", "h", "c_now", "new", "c")
        assert {*arguments, *changing} == set(names)
        self._arguments = [arguments.get(name) for name in names]
        self._places = [names.index(name) for name in changing]
        # Compiled here, if it is not yet, and said: not within the first token.
        with announced("the decoding of a token"), torch.no_grad():
            self(torch.zeros(self._state_shape, dtype=dtype), *torch.zeros(2, *self._vector_shape, dtype=dtype))

    def __call__(self, state: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        # Written out, and dtypes compared by hand: every microsecond here is one per residual and token.
        dtype, vectors, arguments = self.dtype, self._vector_shape, self._arguments.copy()
        if state.dtype is not dtype or h.dtype is not dtype or c.dtype is not dtype:
            state, h, c = state.to(dtype), h.to(dtype), c.to(dtype)
        state, h, c = state.contiguous(), h.contiguous(), c.contiguous()
        new, c_new = torch.empty_like(state), torch.empty_like(c) if self.opens else None
        at_state, at_h, at_c, at_new, at_c_new = self._places
        arguments[at_state] = state.numpy().reshape(self._state_shape)
        arguments[at_h] = h.numpy().reshape(vectors)
        arguments[at_c] = c.numpy().reshape(vectors)
        arguments[at_new] = new.numpy().reshape(self._state_shape)
        arguments[at_c_new] = None if c_new is None else c_new.numpy().reshape(vectors)
        self._kernel(*arguments)
        return new, c_new


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().contiguous().numpy()

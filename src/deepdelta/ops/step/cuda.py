"""The fused step on CUDA: Triton's kernels over torch's memory, compiled once per width, V, dtype and setting.

Bytes per token, with B per number of the state: forward reads X and h and writes X' and c', 2 (V + 1) D B; backward
reads X, h and the two gradients and writes dX and dh, 3 (V + 1) D B. A token stays in registers from the first pass
over it to the last while V and D, each rounded up to a power of two, multiply to at most WHOLE_FORWARD or
WHOLE_BACKWARD; a larger one comes from memory for the first pass and from the cache for the one or two after it.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from deepdelta.ops.step import cuda_kernel
from deepdelta.ops.step.reference import Gating, Normalise

WHOLE_FORWARD = 16384
WHOLE_BACKWARD = 8192
TILE = 4096
"""Numbers in a tile of a larger token."""
NUMBERS_PER_THREAD = 32
RESIDENT_WARPS = 8
"""Warps of the backward kernel that a processor holds at once: each of their threads takes up to 255 registers."""


class Blocks(NamedTuple):
    """A tile of a token, and the warps that share it."""

    channels: int
    width: int
    warps: int

    def settings(self) -> dict[str, int]:
        return {"BLOCK_V": self.channels, "BLOCK_D": self.width, "num_warps": self.warps}


def blocks(channels: int, width: int, dtype: torch.dtype, whole: int) -> Blocks:
    """The whole token up to `whole` numbers, of which fp64 counts two each; else tiles of all value channels."""
    size = 2 if dtype == torch.float64 else 1
    rows, columns = _power_of_two(channels), _power_of_two(width)
    if rows * columns * size > whole:
        columns = max(1, TILE // (rows * size))
    warps = rows * columns * size // (32 * NUMBERS_PER_THREAD)
    return Blocks(rows, columns, max(1, min(16, warps)))


def forward(
    state: Tensor,
    h: Tensor,
    gating: Gating | None,
    write: Tensor,
    erase: Tensor | None,
    normalise: Normalise,
    opening: Sequence[Tensor | None],
    norm_eps: float,
    filled: Sequence[Tensor | None],
) -> None:
    """Fill new, c, scale, read, inverse and coefficient; `opening` is the compression and the weight of the norm."""
    assert gating is None, "on this device PyTorch makes the coefficients"
    tokens, channels, width = state.shape
    tile = blocks(channels, width, state.dtype, WHOLE_FORWARD)
    if tokens:
        with torch.cuda.device(state.get_device()):
            cuda_kernel.forward[tokens,](
                state, h, write, erase, *opening, *filled[:6],
                OFFSET=normalise.offset, POWER=normalise.power, EPS=norm_eps, V=channels, D=width,
                GATES=0 if erase is None else erase.shape[1], **tile.settings(),
            )  # fmt: skip


def backward(
    state: Tensor,
    h: Tensor,
    gating: Gating | None,
    write: Tensor,
    erase: Tensor | None,
    normalise: Normalise,
    opening: Sequence[Tensor | None],
    known: Sequence[Tensor | None],
    incoming: Sequence[Tensor | None],
    filled: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Fill the gradients of state, h, write and erase.

    Args:
        known: scale, read, inverse and coefficient of the forward pass.
        incoming: the gradients of new and c.

    Returns:
        The gradients of compression and norm weight; None where there is none.
    """
    assert gating is None, "on this device PyTorch makes the coefficients"
    tokens, channels, width = state.shape
    d_state, d_h, _, d_write, d_erase = filled
    tile = blocks(channels, width, state.dtype, WHOLE_BACKWARD)
    # Enough programs to fill the device once; each takes a run of tokens and sums its gradients of the parameters.
    programs = min(tokens, _processors(state.device) * max(1, RESIDENT_WARPS // tile.warps))
    sums = [None if p is None else p.new_empty(programs, *p.shape) for p in opening]
    if tokens:
        with torch.cuda.device(state.get_device()):
            cuda_kernel.backward[programs,](
                state, h, write, erase, *opening, *known[:4], *incoming, d_state, d_h, d_write, d_erase, *sums, tokens,
                OFFSET=normalise.offset, POWER=normalise.power, V=channels, D=width,
                GATES=0 if erase is None else erase.shape[1], **tile.settings(),
            )  # fmt: skip
    return [None if total is None else total.sum(0) for total in sums]


def replay(state: Tensor, h: Tensor, coefficient: Tensor, new: Tensor) -> None:
    """Fill X + h a^T: X' again, bit for bit, from the a that the forward pass stored."""
    tokens, channels, width = state.shape
    tile = blocks(channels, width, state.dtype, WHOLE_FORWARD)
    if tokens:
        with torch.cuda.device(state.get_device()):
            cuda_kernel.replay[tokens,](state, h, coefficient, new, V=channels, D=width, **tile.settings())


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    # Triton's interpreter, which runs the same programs one after another on CPU tensors, counts as one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

"""How the kernels cut a token into tiles, and how many warps share one.

For the sizes in MEASURED by a study of what the compiler makes for sm_90, without a GPU: of the tiles that need no
spilled registers, the one that keeps most bytes in flight per processor (`tests/triton_study.py`, which writes
results/triton-sm90). Nothing there is a time. Other sizes follow a rule.
"""

from typing import NamedTuple

import torch

WHOLE_FORWARD = 16384
WHOLE_BACKWARD = 8192
TILE = 4096
"""Numbers in a tile of a larger token."""
NUMBERS_PER_THREAD = 32
RESIDENT_WARPS = 8
"""Warps of the backward kernel that a processor holds at once: each of their threads takes up to 255 registers."""


class Blocks(NamedTuple):
    """A tile of a token, the warps that share it, and the programs of so many warps that a processor holds at once."""

    channels: int
    width: int
    warps: int
    programs: int


MEASURED: dict[tuple[str, int, int], dict[int, tuple[int, int, int]]] = {
    ("forward", 1, 2): {768: (1024, 2, 18), 1024: (1024, 4, 12), 2048: (2048, 8, 6), 4096: (4096, 16, 3)},
    ("backward", 1, 2): {768: (1024, 1, 9), 1024: (1024, 4, 6), 2048: (2048, 4, 3), 4096: (4096, 4, 2)},
    ("forward", 1, 4): {768: (1024, 4, 16), 1024: (1024, 4, 16), 2048: (2048, 8, 8), 4096: (4096, 16, 4)},
    ("backward", 1, 4): {768: (1024, 4, 5), 1024: (1024, 4, 6), 2048: (2048, 8, 3), 4096: (4096, 16, 1)},
    ("forward", 4, 2): {768: (1024, 4, 7), 1024: (1024, 4, 7), 2048: (2048, 8, 3), 4096: (4096, 16, 2)},
    ("backward", 4, 2): {768: (1024, 4, 2), 1024: (1024, 4, 2), 2048: (2048, 8, 1), 4096: (512, 2, 5)},
    ("forward", 4, 4): {768: (1024, 8, 5), 1024: (1024, 16, 3), 2048: (2048, 16, 2), 4096: (4096, 16, 1)},
    ("backward", 4, 4): {768: (1024, 16, 1), 1024: (1024, 4, 2), 2048: (2048, 8, 1), 4096: (512, 4, 4)},
    ("forward", 16, 2): {768: (1024, 16, 1), 1024: (1024, 16, 1), 2048: (256, 4, 5), 4096: (256, 4, 5)},
    ("backward", 16, 2): {768: (128, 2, 4), 1024: (128, 2, 4), 2048: (128, 2, 4), 4096: (256, 4, 2)},
    ("forward", 16, 4): {768: (1024, 16, 1), 1024: (1024, 16, 1), 2048: (128, 4, 7), 4096: (256, 8, 4)},
    ("backward", 16, 4): {768: (128, 4, 3), 1024: (128, 4, 3), 2048: (128, 4, 3), 4096: (256, 4, 2)},
}
"""By kernel, value channels, bytes of a number and width: the tile's width, warps, programs."""


def blocks(kernel: str, channels: int, width: int, dtype: torch.dtype) -> Blocks:
    """Of the kernel forward, backward or replay, which takes the forward's.

    Where nothing was measured, the whole token up to WHOLE_FORWARD or WHOLE_BACKWARD numbers, of which fp64 counts two
    each; else tiles of all value channels.
    """
    rows, columns = power_of_two(channels), power_of_two(width)
    measured = MEASURED.get(("backward" if kernel == "backward" else "forward", channels, dtype.itemsize), {})
    if width in measured:
        return Blocks(rows, *measured[width])
    size = 2 if dtype == torch.float64 else 1
    if rows * columns * size > (WHOLE_BACKWARD if kernel == "backward" else WHOLE_FORWARD):
        columns = max(1, TILE // (rows * size))
    warps = max(1, min(16, rows * columns * size // (32 * NUMBERS_PER_THREAD)))
    return Blocks(rows, columns, warps, max(1, RESIDENT_WARPS // warps))


def power_of_two(number: int) -> int:
    """The least that is not below a number."""
    return 1 << (number - 1).bit_length()

"""One sublayer's rewrite from the branch output, in plain PyTorch, and with the opening of the next sublayer.

Shapes: V value channels, D compute width, G gates (1, or V); `...` any leading axes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deepdelta.ops.precision import accumulation_dtype
from deepdelta.ops.rewrite import rewrite


class Normalise(NamedTuple):
    """How a vector h becomes the direction k = s h, and how the write goes with it.

    s = 1 / sqrt(|h|^2 + offset), or the constant where offset is None.
    X' = X + h (s^power w - s^2 b (h^T X))^T: power 1 writes w along k, power 0 writes w along h itself, power 2 is the
    operator form, which divides the write as it does the erase.
    """

    offset: float | None
    power: int
    constant: float = 1.0


class Gating(NamedTuple):
    """Numbers that the coefficients come from: beta = a 2 sigmoid(the first G), and v the V after them."""

    numbers: Tensor
    """(..., G) or (..., G + V), in the precision of sums; v is 0 where there are G."""
    gates: int
    """G, 1 or V."""
    erases: bool
    """Whether beta is b."""
    share: float | None = None
    """With a share beta is the erase's alone, and w = 1 + share v; None: beta scales what is written, w = beta v."""
    factor: Tensor | None = None
    """a, (1), in the precision of sums; None: 1."""

    def beta(self) -> Tensor:
        """(..., G)."""
        beta = 2 * torch.sigmoid(self.numbers[..., : self.gates])
        return beta if self.factor is None else self.factor * beta

    def target(self) -> Tensor | None:
        """v, (..., V); None without one."""
        return self.numbers[..., self.gates :] if self.numbers.shape[-1] > self.gates else None

    def coefficients(self) -> tuple[Tensor | float, Tensor | None]:
        """w (..., V), or a number without v, and b (..., G), or None."""
        beta, v = self.beta(), self.target()
        if v is None:
            write: Tensor | float = 0.0 if self.share is None else 1.0
        else:
            write = beta * v if self.share is None else 1 + (v if self.share == 1 else self.share * v)
        return write, beta if self.erases else None


class Rewritten(NamedTuple):
    state: Tensor
    """X', (..., V, D)."""
    read: Tensor | None
    """h^T X, (..., V); None without an erase term."""
    scale: Tensor | float
    """s, (..., 1)."""


def scale_of(h: Tensor, normalise: Normalise) -> Tensor | float:
    """s, (..., 1) in fp32 or wider: 1 / sqrt(|h|^2 + offset), or the constant."""
    if normalise.offset is None:
        return normalise.constant
    wide = h.to(accumulation_dtype(h.dtype))
    # A reciprocal of a root: the derivative of rsqrt has the scale cubed, which leaves the range of fp32.
    return (wide.square().sum(-1, keepdim=True) + normalise.offset).sqrt().reciprocal()


def rewrite_along(
    state: Tensor, h: Tensor, write: Tensor | float, erase: Tensor | None, normalise: Normalise
) -> Rewritten:
    """X + k (w^T - b k^T X) for k = s h, without ever storing k: h takes w s^power and b s^2.

    At h = 0 the direction is 0, and its derivative 1 / sqrt(offset). A number as `write` goes along h as it is: 1 adds
    h to every value channel, 0 writes nothing.
    """
    scaled = normalise.power > 0 and isinstance(write, Tensor)
    scale = scale_of(h, normalise) if scaled or erase is not None else 1.0
    if scaled:
        write = write * (scale if normalise.power == 1 else scale * scale)
    coefficient = None if erase is None else erase * (scale * scale)
    return Rewritten(*rewrite(state, h, write, coefficient), scale)


def rewrite_step(
    state: Tensor,
    h: Tensor,
    write: Tensor,
    erase: Tensor | None,
    normalise: Normalise,
    compression: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """(X', c'): the rewritten state, and c' = RMSNorm(sum_j C_j * X'_j), the next branch's input (..., D).

    `compression` C (V, D) None takes the one value channel; `norm_weight` (D) None leaves the norm out.
    """
    new_VD = rewrite_along(state, h, write, erase, normalise).state
    wide_VD = new_VD.to(accumulation_dtype(state.dtype))
    x_in_D = wide_VD.squeeze(-2) if compression is None else (wide_VD * compression.to(wide_VD.dtype)).sum(-2)
    if norm_weight is None:
        return new_VD, x_in_D.to(state.dtype)
    inverse = (x_in_D.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    return new_VD, (x_in_D * inverse * norm_weight.to(wide_VD.dtype)).to(state.dtype)

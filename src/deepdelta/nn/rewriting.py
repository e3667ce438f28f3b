"""One rewrite of a residual: what it takes, how a fused step does it, how it is done again, what is recorded of it.

Shapes: V value channels, D compute width; `...` any leading axes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deepdelta.nn.activation_memory import detached
from deepdelta.nn.input_map import InputWeights
from deepdelta.ops import read_along, rewrite
from deepdelta.ops.step import Gating, Normalise, Rewritten, fused_step, remake, rewrite_along, scale_of


class RewriteRecord(NamedTuple):
    """One rewrite seen from inside; detached, in fp32 or wider; None where the rule has no such thing.

    With rule `channels` it is that of the transposed state: V and D change places, and k is made of itself.
    """

    beta: Tensor | None
    """The gate of the write (of the erase for erase_only, additive_erase and channels), (..., 1) or (..., V)."""
    erase: Tensor | None
    """The erase coefficient b, (..., 1) or (..., V)."""
    read: Tensor
    """k^T X before the rewrite, (..., V)."""
    target: Tensor | None
    """v, (..., V), on the scale of the read along k."""
    norm: Tensor
    """|k|, (...)."""
    branch_norm: Tensor
    """The size of the vector that k is made of, sqrt(|h|^2 + eps^2), (...)."""
    cosine: Tensor
    """cos(k, X_j) per value channel, (..., V); 0 where either is 0."""
    write: Tensor
    """w, (..., V), on the scale of k: what is written is k w^T."""
    direction: Tensor
    """k, (..., D)."""
    state_norm: Tensor
    """|X_j| before the rewrite, per value channel, (..., V)."""


class Step(NamedTuple):
    """One rewrite along the direction of h, as `ops.step` takes it, with the gate and the target for the recorder."""

    h: Tensor
    write: Tensor | float
    erase: Tensor | None
    normalise: Normalise
    beta: Tensor | None
    target: Tensor | None
    """v on the scale of the write: 1 + W c where |h| (1 + W c) is written along h."""
    gating: Gating | None = None
    """What a fused step is to make write and erase of."""
    across: bool = False
    """Whether it rewrites the transposed state: h is k, (..., V), and write w h, (..., D)."""

    def along(self, state_VD: Tensor) -> "Step":
        """The step itself; one across value channels as the write of k along its row w h - b k^T X, (..., D)."""
        if not self.across:
            return self
        row_D = self.write if isinstance(self.write, Tensor) else torch.full_like(state_VD[..., 0, :], self.write)
        if self.erase is not None:
            row_D = row_D - self.erase * read_along(state_VD.mT, self.h)
        return Step(row_D, self.h, None, self.normalise, None, None)

    def detached(self) -> "Step":
        """What is needed to do it again, without its graph."""
        return Step(detached(self.h), detached(self.write), detached(self.erase), self.normalise, None, None)


Remakes = Callable[[], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]


def fused(state_VD: Tensor, step: Step, opening: InputWeights | None) -> tuple[Tensor, Tensor | None, Remakes]:
    """X', c' where the next sublayer is opened too, and what makes X' of X and X of X'."""
    new_VD, c_D, done = fused_step(
        state_VD,
        step.h,
        step.write,
        step.erase,
        step.normalise,
        *(opening or InputWeights()),
        opens=opening is not None,
        gating=step.gating,
    )
    return new_VD, c_D, lambda: (partial(remake, done), partial(remake, done, backwards=True))


@torch.no_grad()
def redo(step: Step, state_VD: Tensor) -> Tensor:
    return rewrite_along(state_VD, step.h, step.write, step.erase, step.normalise).state


@torch.no_grad()
def undo(step: Step, scale: Tensor | float, read_V: Tensor | None, new_VD: Tensor) -> Tensor:
    """X = X' - h a^T with the coefficients a that the step had."""
    power = step.normalise.power if isinstance(step.write, Tensor) else 0
    coefficient = step.write * scale**power
    if step.erase is not None and read_V is not None:
        coefficient = coefficient - step.erase * scale**2 * read_V
    return rewrite(new_VD, step.h, -coefficient, None)[0]


def record(state_VD: Tensor, step: Step, rewritten: Rewritten, eps: float) -> RewriteRecord:
    """What the rewrite used, on the scale of k; where it had no read of its own, the read along the unit direction."""
    raw_V = read_along(state_VD, step.h) if rewritten.read is None else rewritten.read
    h_D = step.h.to(raw_V.dtype)
    scale, size = scale_of(step.h, step.normalise), h_D.norm(dim=-1, keepdim=True)
    # The operator form compares the raw read with v: on the scale of k both are smaller by s. Along h v lacks |h|.
    target = None if step.target is None else step.target * scale ** (step.normalise.power - 1)
    state_norm_V = state_VD.to(raw_V.dtype).norm(dim=-1)
    sizes_V = size * state_norm_V
    cosine_V = torch.where(sizes_V > 0, raw_V / sizes_V, torch.zeros_like(raw_V))
    branch_norm = (size.square() + eps * eps).sqrt().squeeze(-1)
    power = step.normalise.power if isinstance(step.write, Tensor) else 0
    write_V = (torch.zeros_like(raw_V) + step.write) * scale ** (power - 1)
    values = (
        *(step.beta, step.erase, raw_V * scale, target, (size * scale).squeeze(-1), branch_norm, cosine_V),
        *(write_V, h_D * scale, state_norm_V),
    )
    return RewriteRecord(*(None if value is None else value.detach() for value in values))  # type: ignore[arg-type]

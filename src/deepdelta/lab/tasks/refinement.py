"""The depth equation behind a delta residual: its layers as steps of dX/dt = beta k (v^T - k^T X), and finer steps.

With k, v and beta held, n steps of gate beta / n leave (1 - beta / n)^n of a layer's error k^T X - v^T, which goes to
exp(-beta): close to the layer's own 1 - beta for a small gate, and never <= 0, so finer steps destroy what a projection
(beta = 1) or a reflection (beta = 2) does.

Shapes: B points, V value channels, D width, L layers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.nn import DeltaResidual, ResidualConfig, RewriteRecord, recording
from deepdelta.operator import DeltaOperator
from deepdelta.ops import rewrite


class Rewriting(NamedTuple):
    """What one layer does to a state: X' = X + k (w^T - b k^T X)."""

    direction: Tensor
    """k, (B, D); h itself where the rule writes it."""
    write: Tensor | float
    """w, (B, V), or one number."""
    erase: Tensor | None
    """b, (B, 1) or (B, V); None where the rule does not erase."""

    def step(self, state: Tensor, share: float) -> Tensor:
        """The rewrite with this share of its gate."""
        erase = None if self.erase is None else share * self.erase
        return rewrite(state, self.direction, share * self.write, erase)[0]


def can_refine(config: ResidualConfig) -> bool:
    """Whether a layer is one step of the depth equation along the unit direction of its branch, or a plain addition."""
    plain = config.rule == "additive" and config.value_channels == 1
    gated = config.rule in ("delta", "write_only", "erase_only")
    parts = (config.direction, config.direction_norm, config.rank, config.needs_tokens)
    return (plain or gated) and parts == ("branch", "unit", 1, False)


@torch.no_grad()
def rewriting(residual: DeltaResidual, state: Float[Tensor, "B V D"]) -> Rewriting:
    """The rewrite that a residual would make of this state.

    Raises:
        UserError: not one rewrite along the unit direction of its branch.
    """
    config = residual.config
    if not can_refine(config):
        raise UserError(
            "a layer is a step of the depth equation for the rules delta, write_only, erase_only, or additive with one "
            f"value channel, along the unit direction of its branch, nothing working over tokens, got {config}."
        )
    c, close = residual.open(state)
    assert residual.branch is not None
    h = residual.branch(c)
    if config.rule == "additive":
        return Rewriting(h, 1.0, None)
    records: list[RewriteRecord] = []
    with recording(residual, lambda _, record: records.append(record)):
        close(h)
    (record,) = records
    assert record.beta is not None
    k = h / (h.square().sum(-1, keepdim=True) + config.direction_eps**2).sqrt()
    write = 0.0 if record.target is None else record.beta * record.target
    return Rewriting(k, write, record.erase)


def refined(
    residuals: list[DeltaResidual], state: Float[Tensor, "B V D"], substeps: int, *, follow: bool = False
) -> Float[Tensor, "B V D"]:
    """The state after all layers, each made in `substeps` steps with that share of its gate.

    Args:
        follow: ask the layer again for k, v and beta before every substep, as a finer solver of the depth equation
            does; otherwise they stay what they were at the layer's start.
    """
    for residual in residuals:
        now = rewriting(residual, state)
        for substep in range(substeps):
            if follow and substep:
                now = rewriting(residual, state)
            state = now.step(state, 1 / substeps)
    return state


def flowed(residuals: list[DeltaResidual], state: Float[Tensor, "B V D"]) -> Float[Tensor, "B V D"]:
    """The limit of `refined` for infinitely many substeps with k, v and beta held: errors shrink by exp(-b)."""
    for residual in residuals:
        now = rewriting(residual, state)
        if now.erase is None:
            state = now.step(state, 1.0)
            continue
        # With e the error: X + k (exp(-b) - 1) e; (1 - exp(-b)) / b is the share of the step that the flow makes.
        share = torch.where(now.erase > 1e-6, -torch.expm1(-now.erase) / now.erase.clamp(min=1e-6), 1.0)
        state = rewrite(state, now.direction, share * now.write, share * now.erase)[0]
    return state


class Spectrum(NamedTuple):
    special: Float[Tensor, "B L"]
    """The eigenvalue of every layer's shortcut I - b k k^T that is not 1 by itself: 1 - b."""
    product: Tensor
    """All eigenvalues of the shortcuts' product over depth, (B, D), complex."""


@torch.no_grad()
def spectrum(residuals: list[DeltaResidual], state: Float[Tensor, "B V D"]) -> Spectrum:
    """The shortcuts' eigenvalues along the way of these states; of gates per value channel, the first."""
    operators, special = [], []
    for residual in residuals:
        now = rewriting(residual, state)
        erase_B = torch.zeros_like(state[:, 0, 0]) if now.erase is None else now.erase[:, 0].to(state.dtype)
        operators.append(DeltaOperator(now.direction, erase_B))
        special.append(1 - erase_B * now.direction.square().sum(-1))
        state = now.step(state, 1.0)
    product = DeltaOperator.compose(operators).eigenvalues()
    return Spectrum(torch.stack(special, dim=-1), product)

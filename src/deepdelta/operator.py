"""The frozen operator I - beta k k^T, and products of such operators, as objects for study.

Shapes: B batch axes, V value channels, D width, L directions, R = min(D, L).
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Inexact, Int, Shaped
from torch import Tensor

from deepdelta import notebook
from deepdelta.errors import UserError
from deepdelta.ops.gates import check_gate, where

SHOWN = 500  # batch entries, and eigenvalues, that a notebook shows
ROUNDING_STEPS = 8  # numbers closer than this many machine epsilons of the dtype count as equal


class DeltaOperator:
    """A = I - K T K^T: one rewrite I - beta k k^T (K = k, T = beta), or a product of them in compact WY form.

    All quantities come from K and T; no D x D matrix is formed, except by `dense` and where more than D directions
    make D x D the smaller size. Everything is batched, differentiable and keeps the dtype.

    `direction` is taken as it is, never normalised. With n = ||k||^2 the special eigenvalue of I - beta k k^T is
    1 - beta n; for a unit k it is 1 - beta. A zero direction gives the identity.

    One gate per value channel is one operator per channel: give `direction` and `gate` the channel as last batch axis;
    the determinant of the lifted map is then `determinant().prod(-1)`.

    Args:
        direction: k, one vector of width D per batch entry; float32 or float64.
        gate: beta, one number per batch entry, in [0, 2].
        unbounded: allow any gate.

    Raises:
        UserError: shapes, dtypes or devices do not agree, or a gate lies outside [0, 2] without `unbounded`.

    Source: arXiv 2601.00417, the Delta operator; compact WY form: Schreiber and Van Loan (1989).
    """

    K: Float[Tensor, "*batch d L"]
    T: Float[Tensor, "*batch L L"]

    def __init__(self, direction: Float[Tensor, "... d"], gate: Float[Tensor, "..."], *, unbounded: bool = False):
        if direction.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"direction must be float32 or float64, got {direction.dtype}: convert it and the gate with .float(); "
                "linear algebra does not exist in half precision."
            )
        if gate.shape != direction.shape[:-1]:
            raise UserError(
                f"gate must have one number per direction, shape {tuple(direction.shape[:-1])} for a direction of "
                f"shape {tuple(direction.shape)}, got {tuple(gate.shape)}: reshape or expand the gate."
            )
        _require_same_kind("gate", gate, "the direction", direction)
        if not unbounded:
            check_gate(gate)
        self.K = direction[..., None]
        self.T = gate[..., None, None]

    def __repr__(self) -> str:
        *batch, dim, directions = self.K.shape
        return f"DeltaOperator(dim={dim}, directions={directions}, batch={tuple(batch)}, dtype={self.K.dtype})"

    def _repr_html_(self) -> str:
        """For a notebook: what it does and its nontrivial eigenvalues; of a large batch those of the first entries."""
        *batch, dim, directions = self.K.shape
        rows: list[tuple[str, object]] = [("width", dim), ("directions", directions), ("batch", tuple(batch))]
        K_BDL, T_BLL = (factor.detach().flatten(0, -3)[:SHOWN] for factor in (self.K[None], self.T[None]))
        some = self._from_factors(K_BDL, T_BLL)
        if not (K_BDL.numel() and some.dense().isfinite().all()):
            return notebook.table("DeltaOperator", rows)
        if directions == 1:
            rows.append(("it does", ", ".join(sorted(set(some.regime().tolist())))))
        eigenvalues = some.eigenvalues()[..., -min(dim, directions) :].flatten().tolist()
        rows += [("determinant", _span(some.determinant())), ("singular values", _span(some.singular_values()))]
        return notebook.shown(notebook.table("DeltaOperator", rows), notebook.spectrum(eigenvalues[:SHOWN]))

    @classmethod
    def _from_factors(cls, K_BDL: Tensor, T_BLL: Tensor) -> "DeltaOperator":
        operator = cls.__new__(cls)
        operator.K, operator.T = K_BDL, T_BLL
        return operator

    @classmethod
    def compose(cls, operators: Sequence["DeltaOperator"]) -> "DeltaOperator":
        """The product A_L ... A_1 of operators listed in order of application: A_1, the first to act, comes first.

        K = [K_1 ... K_L], T = (I + diag(T_i) stril(K^T K))^-1 diag(T_i), block by block; for single rewrites the blocks
        T_i are the gates.

        Raises:
            UserError: no operators, or they differ in width, batch shape, dtype or device.
        """
        if not operators:
            raise UserError("compose needs at least one operator, got none: pass a list in order of application.")
        first = operators[0]
        for i, operator in enumerate(operators):
            if operator.K.shape[:-1] != first.K.shape[:-1]:
                raise UserError(
                    f"composed operators must agree in (*batch, width): operator 0 has {tuple(first.K.shape[:-1])}, "
                    f"operator {i} has {tuple(operator.K.shape[:-1])}: expand the directions and gates of one of them."
                )
            _require_same_kind(f"operator {i}", operator.K, "operator 0", first.K)
        K_BDL = torch.cat([operator.K for operator in operators], dim=-1)
        sizes = [operator.K.shape[-1] for operator in operators]
        ends = list(accumulate(sizes))
        rows = [F.pad(o.T, (end - size, ends[-1] - end)) for o, size, end in zip(operators, sizes, ends, strict=True)]
        blocks_BLL = torch.cat(rows, dim=-2)
        owner_L = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)], device=K_BDL.device)
        gram_BLL = K_BDL.mT @ K_BDL * (owner_L[:, None] > owner_L)
        lower_BLL = _eye_like(blocks_BLL) + blocks_BLL @ gram_BLL
        T_BLL = torch.linalg.solve_triangular(lower_BLL, blocks_BLL, upper=False, unitriangular=True)
        return cls._from_factors(K_BDL, T_BLL)

    def apply(self, state: Float[Tensor, "*any V d"]) -> Float[Tensor, "*any V d"]:
        """A x for every value channel x, a row of the state; leading axes of the state end with the batch axes.

        Raises:
            UserError: the state's width, batch axes, dtype or device are not the operator's.
        """
        batch, dim = tuple(self.K.shape[:-2]), self.K.shape[-2]
        fits = state.ndim >= len(batch) + 2 and state.shape[-1] == dim
        if not fits or state.shape[state.ndim - 2 - len(batch) : -2] != batch:
            wanted = ", ".join(["...", *map(str, batch), "V", str(dim)])
            raise UserError(
                f"state must have shape ({wanted}), its value channels as rows, got {tuple(state.shape)}: "
                "transpose, expand or unsqueeze the state."
            )
        _require_same_kind("state", state, "the operator", self.K)
        return state - state @ self.K @ self.T.mT @ self.K.mT

    def dense(self) -> Float[Tensor, "*batch d d"]:
        """The D x D matrix; it acts on column vectors: A @ x."""
        update_BDD = self.K @ self.T @ self.K.mT
        return _eye_like(update_BDD) - update_BDD

    def eigenvalues(self) -> Inexact[Tensor, "*batch d"]:
        """All D eigenvalues, the D - R trivial ones (exactly 1) first.

        One direction: real, the last is 1 - beta n. Several: of complex dtype, the last R from an R x R matrix.
        The gradient exists where A is diagonalisable; for several directions only the first derivative.
        """
        if self.K.shape[-1] == 1:
            return self._with_ones(1 - self._TG()[..., 0])
        return self._with_ones(1 - torch.linalg.eigvals(self._small_update()))

    def singular_values(self) -> Float[Tensor, "*batch d"]:
        """All D singular values, largest first; one direction: 1 (D - 1 times) and abs(1 - beta n).

        First derivatives only; at a singular value of 0, where there is none, autograd returns a one-sided one.
        """
        update_BRR = self._small_update()
        sigma_BR = torch.linalg.svdvals(_eye_like(update_BRR) - update_BRR)
        return self._with_ones(sigma_BR).sort(dim=-1, descending=True).values

    def determinant(self, value_channels: int = 1) -> Float[Tensor, "*batch"]:
        """det(I_V (x) A) = det(A)^V, the determinant on a state of V value channels; one direction: (1 - beta n)^V."""
        determinant_B: Tensor = torch.linalg.det(_eye_like(self.T) - self._TG())
        return determinant_B.pow(value_channels)

    def inverse(self) -> "DeltaOperator":
        """A^-1 = I + K (I - T K^T K)^-1 T K^T; one direction: I + beta / (1 - beta n) k k^T.

        Raises:
            UserError: A is singular to working precision: a factor projects (beta n = 1), or many shrink. The smallest
                singular value must exceed 8 L eps max(1, largest singular value), eps the dtype's machine epsilon.
        """
        sigma_BD = self.singular_values().detach()
        limit_B = ROUNDING_STEPS * self.K.shape[-1] * torch.finfo(self.K.dtype).eps * sigma_BD[..., 0].clamp(min=1)
        if (singular := sigma_BD[..., -1] <= limit_B).any():
            raise UserError(
                "an inverse needs every singular value above rounding, so beta ||k||^2 != 1 in every factor, "
                f"got {sigma_BD[..., -1][singular][0].item():.1e} {where(singular)}: "
                "change these gates, or compose fewer factors."
            )
        return self._from_factors(self.K, -torch.linalg.solve(_eye_like(self.T) - self._TG(), self.T))

    def power(self, n: int) -> "DeltaOperator":
        """A^n for any integer n, on the same directions; a negative n is a power of the inverse.

        Raises:
            UserError: n < 0 and A has no inverse.
        """
        if n < 0:
            return self.inverse().power(-n)
        gram_BLL = self.K.mT @ self.K
        result_BLL, square_BLL = torch.zeros_like(self.T), self.T
        while n:  # (I - K S K^T)(I - K T K^T) = I - K (S + T - S K^T K T) K^T
            if n & 1:
                result_BLL = result_BLL + square_BLL - result_BLL @ gram_BLL @ square_BLL
            square_BLL = 2 * square_BLL - square_BLL @ gram_BLL @ square_BLL
            n >>= 1
        return self._from_factors(self.K, result_BLL)

    def regime(self) -> Shaped[np.ndarray, "*batch"]:
        """The name of what a single rewrite does, per batch entry; `.tolist()` gives plain strings.

        By beta n: 0 identity, (0, 1) under-relaxed, 1 projection, (1, 2) over-relaxed, 2 reflection, outside [0, 2]
        unstable. Equality with 0, 1 and 2 is within 8 eps of the dtype: 1.8e-15 in float64, 9.5e-7 in float32.

        Raises:
            UserError: the operator is a product over several directions.
        """
        if self.K.shape[-1] != 1:
            raise UserError(
                f"a regime belongs to a single rewrite, this operator has {self.K.shape[-1]} directions: ask each "
                "factor before compose, or use eigenvalues() and singular_values()."
            )
        strength_B = self._TG()[..., 0, 0].detach()
        near = [(strength_B - c).abs() <= ROUNDING_STEPS * torch.finfo(strength_B.dtype).eps for c in (0, 1, 2)]
        between = [(strength_B > low) & (strength_B < low + 1) for low in (0, 1)]
        names = ["identity", "projection", "reflection", "under-relaxed", "over-relaxed"]
        return np.select([condition.cpu().numpy() for condition in (*near, *between)], names, "unstable")

    def effective_rank(self, threshold: float) -> Int[Tensor, "*batch"]:
        """How many singular values of I - A exceed `threshold`, an absolute number: by how many directions A acts.

        One direction has the single value abs(beta) n; at most R values differ from 0.

        Raises:
            UserError: the threshold is negative or not finite.
        """
        if not (math.isfinite(threshold) and threshold >= 0):
            raise UserError(f"threshold must be a finite number >= 0, got {threshold}: try 1e-6.")
        sigma_BR: Tensor = torch.linalg.svdvals(self._small_update().detach())
        return (sigma_BR > threshold).sum(dim=-1)

    def _TG(self) -> Tensor:
        """T K^T K (L x L); of a single rewrite: beta n."""
        TG_BLL: Tensor = self.T @ self.K.mT @ self.K
        return TG_BLL

    def _small_update(self) -> Tensor:
        """Q^T (I - A) Q (R x R) for an orthonormal Q whose columns span those of K; A is the identity on the rest.

        T K^T K has the same eigenvalues, but can be defective where A is not (two equal reflections), which costs half
        the digits. Q is a constant to autograd: on the rest I - A and its first derivative vanish, so first
        derivatives are exact, also for dependent directions, where QR has none. Second ones are refused.
        """
        Q_BDR = torch.linalg.qr(self.K.detach()).Q
        coords_BRL = Q_BDR.mT @ self.K
        update_BRR: Tensor = _DifferentiableOnce.apply(coords_BRL @ self.T @ coords_BRL.mT, 1)  # type: ignore[no-untyped-call]
        return update_BRR

    def _with_ones(self, special_BR: Tensor) -> Tensor:
        """The special values behind the ones of the directions that A leaves alone, D in all."""
        trivial = self.K.shape[-2] - special_BR.shape[-1]
        return torch.cat([special_BR.new_ones(*special_BR.shape[:-1], trivial), special_BR], dim=-1)


class _DifferentiableOnce(torch.autograd.Function):
    """The identity; its gradient passes, the gradient of its gradient raises.

    torch's once_differentiable does not do: torch.autograd.grad with named inputs prunes its error and returns numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: int) -> Tensor:
        ctx.order = order
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.order > 1:
            raise UserError(
                "singular values, and eigenvalues of a product, have first derivatives only, "
                "a second one was asked for: take them from torch.linalg of dense() instead."
            )
        return _DifferentiableOnce.apply(grad, ctx.order + 1), None  # type: ignore[no-untyped-call]


def _span(values: Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _eye_like(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _require_same_kind(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if (x.dtype, x.device) != (other.dtype, other.device):
        raise UserError(
            f"{name} must have the dtype and device of {other_name}, {other.dtype} on {other.device}, "
            f"got {x.dtype} on {x.device}: convert it with .to()."
        )

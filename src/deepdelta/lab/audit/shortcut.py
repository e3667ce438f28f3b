"""The composed shortcut: what is left of a state after all erases of a model, as a linear map and its spectrum.

With the writes left out, the sublayers multiply a token's state by A_L ... A_1, A_i = I - b_i k_i k_i^T.

Shapes: S sampled tokens, G gates (1, or one per value channel), D width, L factors, R = min(D, L).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepdelta.operator import DeltaOperator

THRESHOLDS = (0.01, 0.1, 0.5)
"""A direction counts as acted on where a singular value of I - A exceeds one of these."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Mean, extremes and quantiles."""

    mean: float
    least: float
    q05: float
    q25: float
    median: float
    q75: float
    q95: float
    greatest: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Distribution":
        least, q05, q25, median, q75, q95, greatest = np.quantile(values, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)).tolist()
        mean = float(values.mean(dtype=np.float64))
        return cls(mean=mean, least=least, q05=q05, q25=q25, median=median, q75=q75, q95=q95, greatest=greatest)


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The product of the factors up to and including one residual's."""

    residual: str
    """Its name; of a looped GPT with the number of the repetition, 'layers.0.mlp (2)'."""
    smallest_singular_value: float
    """Median over tokens."""
    effective_rank: float
    """Mean over tokens of how many singular values of I - A exceed 0.1."""


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """The spectrum of the product over all residuals, per token (and value channel, where each has its own gate).

    D - R eigenvalues and singular values are exactly 1 and left out: the product acts on the span of its L directions.
    """

    tokens: int
    """S."""
    factors: int
    """L, the residuals times their rank."""
    nontrivial: int
    """R."""
    eigenvalue_moduli: Distribution
    eigenvalue_arguments: Distribution
    """Absolute values, in radians: complex eigenvalues come in conjugate pairs."""
    singular_values: Distribution
    effective_rank: dict[str, float]
    """Mean over tokens of how many singular values of I - A exceed each threshold."""
    eigenvalues: tuple[tuple[float, float], ...]
    """Real and imaginary part of every one of the S G R."""
    depth: tuple[Depth, ...]
    """After each residual, in the order of application."""


class Factor(NamedTuple):
    """One rewrite's I - b k k^T for S tokens."""

    residual: str
    direction: Tensor
    """k, (S, D)."""
    erase: Tensor
    """b, (S, G)."""


def shortcut(factors: Sequence[Factor]) -> Shortcut:
    """The spectrum of the product of `factors`, listed in order of application; in fp64."""
    product: DeltaOperator | None = None
    depth: list[Depth] = []
    runs = [name for name, _ in groupby(factor.residual for factor in factors)]
    repeated, seen = len(set(runs)) < len(runs), Counter[str]()
    for i, factor in enumerate(factors):
        k_SGD = factor.direction.double().unsqueeze(-2).expand(-1, factor.erase.shape[-1], -1)
        one = DeltaOperator(k_SGD.contiguous(), factor.erase.double(), unbounded=True)
        product = one if product is None else DeltaOperator.compose([product, one])
        if i + 1 == len(factors) or factors[i + 1].residual != factor.residual:
            seen[factor.residual] += 1
            smallest, rank = product.singular_values()[..., -1], product.effective_rank(0.1)
            depth.append(
                Depth(
                    residual=f"{factor.residual} ({seen[factor.residual]})" if repeated else factor.residual,
                    smallest_singular_value=float(smallest.median()),
                    effective_rank=float(rank.double().mean()),
                )
            )
    assert product is not None
    width = product.K.shape[-2]
    nontrivial = min(width, len(factors))
    # The trivial ones stand first among the eigenvalues; among the singular values they are those closest to 1.
    eigenvalues = product.eigenvalues()[..., width - nontrivial :].to(torch.complex128).flatten()
    singular_SGD = product.singular_values()
    order_SGD = (singular_SGD - 1).abs().argsort(dim=-1)
    singular = singular_SGD.gather(-1, order_SGD)[..., width - nontrivial :].flatten()
    return Shortcut(
        tokens=factors[0].direction.shape[0],
        factors=len(factors),
        nontrivial=nontrivial,
        eigenvalue_moduli=Distribution.of(eigenvalues.abs().numpy()),
        eigenvalue_arguments=Distribution.of(eigenvalues.angle().abs().numpy()),
        singular_values=Distribution.of(singular.numpy()),
        effective_rank={f"{t:g}": float(product.effective_rank(t).double().mean()) for t in THRESHOLDS},
        eigenvalues=tuple((value.real, value.imag) for value in eigenvalues.tolist()),
        depth=tuple(depth),
    )

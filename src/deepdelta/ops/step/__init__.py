"""One sublayer's rewrite, with the opening of the next: the readable version and the fused ones."""

from deepdelta.ops.step.interface import (
    DTYPES,
    NEEDS,
    Done,
    FusedStep,
    fused_problem,
    fused_step,
    known_problem,
    remake,
)
from deepdelta.ops.step.reference import Gating, Normalise, Rewritten, rewrite_along, rewrite_step, scale_of

__all__ = [
    "DTYPES",
    "NEEDS",
    "Done",
    "FusedStep",
    "Gating",
    "Normalise",
    "Rewritten",
    "fused_problem",
    "fused_step",
    "known_problem",
    "remake",
    "rewrite_along",
    "rewrite_step",
    "scale_of",
]

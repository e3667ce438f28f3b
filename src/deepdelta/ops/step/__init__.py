"""One sublayer's rewrite, with the opening of the next: the readable version and the fused ones."""

from deepdelta.ops.step.interface import NEEDS, fused_problem, fused_step
from deepdelta.ops.step.reference import Normalise, Rewritten, rewrite_along, rewrite_step, scale_of

__all__ = [
    "NEEDS",
    "Normalise",
    "Rewritten",
    "fused_problem",
    "fused_step",
    "rewrite_along",
    "rewrite_step",
    "scale_of",
]

"""The rewrite X' = X + k (w^T - b k^T X): one signature, one reference."""

from deepdelta.ops.rewrite.interface import delta_rewrite, rewrite
from deepdelta.ops.rewrite.reference import read_along

__all__ = ["delta_rewrite", "read_along", "rewrite"]

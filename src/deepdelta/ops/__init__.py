"""Pure tensor functions: no parameters, no configuration."""

from deepdelta.ops.precision import accumulation_dtype, without_autocast
from deepdelta.ops.rewrite import delta_rewrite, read_along, rewrite

__all__ = ["accumulation_dtype", "delta_rewrite", "read_along", "rewrite", "without_autocast"]

"""The embedding convolution as one pass."""

from deepdelta.ops.convolution.interface import expand_tokens

__all__ = ["expand_tokens"]

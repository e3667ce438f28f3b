"""The convolutions over tokens, of the expansion and of the compression, each as one pass."""

from deepdelta.ops.convolution.interface import compress_tokens, expand_tokens

__all__ = ["compress_tokens", "expand_tokens"]

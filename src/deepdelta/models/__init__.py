"""Models built on the stream: GPT."""

from deepdelta.models.cache import CacheMemory, DecodingCache
from deepdelta.models.generation import generate
from deepdelta.models.gpt import GPT, GPTConfig, GPTOutput, least_bytes, parameter_count, parameter_shapes

__all__ = [
    "GPT",
    "CacheMemory",
    "DecodingCache",
    "GPTConfig",
    "GPTOutput",
    "generate",
    "least_bytes",
    "parameter_count",
    "parameter_shapes",
]

"""Models built on the stream: GPT."""

from deepdelta.models.cache import CacheMemory, DecodingCache
from deepdelta.models.generation import generate
from deepdelta.models.gpt import GPT, GPTConfig, GPTOutput, parameter_count

__all__ = ["GPT", "CacheMemory", "DecodingCache", "GPTConfig", "GPTOutput", "generate", "parameter_count"]

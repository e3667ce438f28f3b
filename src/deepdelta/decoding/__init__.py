"""Cached decoding of a GPT, one token at a time or several, and sampling from it."""

from deepdelta.decoding.cache import CacheMemory, DecodingCache
from deepdelta.decoding.generation import generate, generate_batch

__all__ = ["CacheMemory", "DecodingCache", "generate", "generate_batch"]

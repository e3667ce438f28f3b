"""Models built on the stream: GPT."""

from deepdelta.models.gpt import GPT, GPTConfig, GPTOutput, least_bytes, parameter_count, parameter_shapes

__all__ = ["GPT", "GPTConfig", "GPTOutput", "least_bytes", "parameter_count", "parameter_shapes"]

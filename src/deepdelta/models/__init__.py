"""Models built on the stream: GPT, and the same with another residual."""

from deepdelta.models.building import LanguageModel, language_model, least_bytes, parameter_count, parameter_shapes
from deepdelta.models.gpt import GPT, GPTConfig, GPTOutput, Rival, logits_at_once
from deepdelta.models.rivals import RivalGPT, rival_problem

__all__ = [
    "GPT",
    "GPTConfig",
    "GPTOutput",
    "LanguageModel",
    "Rival",
    "RivalGPT",
    "language_model",
    "least_bytes",
    "logits_at_once",
    "parameter_count",
    "parameter_shapes",
    "rival_problem",
]

"""From a configuration to the model that it describes, and its sizes without making it."""

from dataclasses import replace
from functools import cache

import torch

from deepdelta.models.gpt import GPT, GPTConfig
from deepdelta.models.rivals import RivalGPT

LanguageModel = GPT | RivalGPT


def language_model(config: GPTConfig, seed: int = 0) -> LanguageModel:
    """A GPT with delta residuals, or with those of the configuration's `rival`.

    Raises:
        UserError: `vocab_size` is not set, or the rival's package is absent.
    """
    return GPT(config, seed) if config.rival is None else RivalGPT(config, seed)


@cache
def parameter_count(config: GPTConfig) -> int:
    """Numbers that a model learns, counted without making them: the layers after the first are all of one size."""
    one, two = (
        sum(shape.numel() for shape in parameter_shapes(replace(config, layers=layers)).values()) for layers in (1, 2)
    )
    return one + (config.layers - 1) * (two - one)


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """The shapes of a model's parameters by name, without their numbers; memory and time are those of its modules."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in language_model(config).named_parameters()}


def least_bytes(config: GPTConfig) -> int:
    """Bytes that a model takes at least: its parameters and the table of its rotations."""
    rotated = int(config.head_width * config.rope_fraction) // 2 * 2
    return 4 * (parameter_count(config) + config.context * rotated)

"""Models of transformers that several test files make, and what they are asked."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, use_backend
from deepdelta.hf import DeepDeltaForCausalLM
from helpers import perturb

SIZES: dict[str, Any] = {"vocab_size": 13, "dim": 12, "heads": 2, "head_dim": 6, "layers": 2, "context": 16}
TC = PRESETS["paper-tc"]
VARIANTS: dict[str, ResidualConfig] = {
    "additive-convolution": PRESETS["additive-convolution"],
    "code-tc": PRESETS["code-tc"],
    "paper-scalar": PRESETS["paper-scalar"],
    "ddl": PRESETS["ddl"],
    "paper-tc": TC,
    # At length: make test-hf.
    "additive": PRESETS["additive"],
    "code-cc": PRESETS["code-cc"],
    "retrofit": PRESETS["retrofit"],
    "taps-3": dataclasses.replace(TC, compression_kernel=3, expansion_kernel=2),
    "pooled-rank-2": ResidualConfig(direction="pooled", target="branch", rank=2),
    "channels": ResidualConfig(rule="channels", value_channels=3),
}
NAMES = [pytest.param(name, marks=[pytest.mark.hf] if i > 2 else []) for i, name in enumerate(VARIANTS)]
PADDING = [0, 3, 7]


def network(residual: ResidualConfig = PRESETS["ddl"], dtype: torch.dtype = torch.float64, **sizes: Any) -> GPT:
    gpt = GPT(GPTConfig(**(SIZES | sizes), residual=residual), seed=3).double()
    perturb(gpt)
    use_backend(gpt, "reference")
    return gpt.to(dtype).eval()


def made(residual: ResidualConfig = PRESETS["ddl"], dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    return DeepDeltaForCausalLM.from_gpt(network(residual, dtype), **more)


def tokens(batch: int = 3, length: int = 11) -> Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(5))


def mask(length: int = 11) -> Tensor:
    """Of rows padded on the left."""
    return (torch.arange(length) >= torch.tensor(PADDING)[:, None]).long()


def near(actual: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)

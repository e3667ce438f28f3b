"""Settings of a whole training run by name, and what the authors published of theirs."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from deepdelta.config import Plain
from deepdelta.errors import UserError, nearest


def _recipe(layers: int, heads: int) -> Plain:
    """Heads of 128 features, 480 sequences of 1,024 tokens a step (docs/numbers.md#how-they-were-obtained)."""
    model = {"vocab_size": 50304, "context": 1024, "layers": layers, "heads": heads, "dim": 128 * heads}
    return {
        "model": model | {"embedding_std": 0.02},
        "steps": 100_000,
        "batch_size": 8,
        "accumulate": 60,
        "lr": 1e-3,
        "warmup": 2000,
    }


RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "small": _recipe(12, 6),
        "medium": _recipe(24, 8),
        "large": _recipe(36, 10),
        "xl": _recipe(24, 16),
        "3b": _recipe(26, 24),
        "7b": _recipe(32, 32),
    }
)
"""`small` (124M) and `medium` (353M) are the authors'; the others, from 772M to 6.6B, go on from these, with nothing
published of them."""


class Published(NamedTuple):
    """One run of the authors on four H200."""

    loss: float
    """Validation loss, nats per token."""
    score: float
    """Average of the 1-shot scores."""
    tokens_per_second: float | None
    """In training, of all four together."""


PUBLISHED: Mapping[tuple[str, str], Published] = MappingProxyType(
    {
        ("small", "additive"): Published(2.8543, 48.56, 1509.6e3),
        ("small", "code-scalar"): Published(2.8482, 48.73, 1330.8e3),
        ("small", "code-tc-repeat"): Published(2.8355, 48.91, 673.2e3),
        ("small", "code-cc-repeat"): Published(2.8321, 49.13, 1019.8e3),
        ("small", "code-tc"): Published(2.8299, 49.47, 783.5e3),
        ("small", "code-cc"): Published(2.8329, 49.29, 1158.0e3),
        ("medium", "additive"): Published(2.6053, 53.96, 537.1e3),
        ("medium", "code-scalar"): Published(2.6039, 54.69, None),
        ("medium", "code-tc-repeat"): Published(2.5927, 54.83, 239.7e3),
        ("medium", "code-cc-repeat"): Published(2.5790, 54.92, 358.5e3),
        ("medium", "code-tc"): Published(2.5905, 54.86, 282.9e3),
        ("medium", "code-cc"): Published(2.5758, 55.14, 422.3e3),
    }
)
"""By recipe and preset (docs/numbers.md)."""


def recipe(name: str) -> Mapping[str, Any]:
    """The settings of this name.

    Raises:
        UserError: there is none; the nearest is named.
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'; {nearest(name, RECIPES)}")
    return RECIPES[name]

"""Analytic operation counts against what real models execute: products by torch's counter, the rest op by op.

Each count is the difference between a batch of two sequences and a batch of one, which leaves the work per token and
drops the work per step (folded convolution weights).
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache
from itertools import combinations
from math import prod
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deepdelta import PRESETS, UserError
from deepdelta.models import GPT, GPTConfig
from deepdelta.models.flops import training_flops_per_token
from deepdelta.nn import ResidualConfig

pytestmark = pytest.mark.usefixtures("unchecked_file")
aten = torch.ops.aten
RULES = get_args(get_type_hints(ResidualConfig)["rule"])
# These are large beside the handful of single numbers per token that the element-wise test leaves open.
BASE: dict[str, Any] = {
    "value_channels": 23,
    "direction_hidden": 31,
    "gate_hidden": 29,
    "expansion_kernel": 3,
    "compression_kernel": 3,
    "gate_init": 0.7,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    name: get_args(kind) for name, kind in get_type_hints(ResidualConfig).items() if get_args(kind)
} | {
    "value_channels": (1, 23),
    "rank": (1, 3),
    "gate_per_channel": (False, True),
    "gate_hidden_bias": (False, True),
    "compression_causal": (False, True),
    "plain_start": (False, True),
    "query": (False, True),
    "erase_blocks": (1, 2),
}


def config_or_none(settings: Mapping[str, Any]) -> ResidualConfig | None:
    try:
        return ResidualConfig(**(BASE | settings))
    except UserError:
        return None


@cache
def configurations() -> list[ResidualConfig]:
    """Every preset; random legal configurations that each add a new pair of choices; what is left one by one."""
    draw = random.Random(0)
    v1 = {"direction": "pooled", "target": "branch"}
    mixed = [{name: draw.choice(values) for name, values in CHOICES.items()} for _ in range(4000)]
    single = [{"rule": rule, name: value} for rule in RULES for name, values in CHOICES.items() for value in values]
    found, covered = list(PRESETS.values()), set[tuple[Any, ...]]()
    for settings in [*mixed, *({**settings, **v1} for settings in mixed), *single]:
        config = config_or_none(settings)
        pairs = set(combinations(settings.items(), 2)) - covered
        if config is not None and pairs:
            found.append(config)
            covered |= pairs
    return found


CONTEXT = 5


def model(residual: ResidualConfig, **sizes: Any) -> GPT:
    settings = {"vocab_size": 13, "context": CONTEXT, "layers": 1, "heads": 2, "dim": 12} | sizes
    return GPT(GPTConfig(residual=residual, **settings))


def token_ids(gpt: GPT, batch: int) -> Tensor:
    return torch.arange(batch * gpt.config.context).view(batch, -1) % 13


def convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """torch's own formula for the weight's gradient ignores groups; a gradient is as much work as the convolution."""
    return 2 * prod(grad) * prod(weight[1:]) * sum(rest[-1][:2])


def products(gpt: GPT) -> tuple[float, float]:
    """Per token, forward and forward + backward, as torch counts them (with plain attention: the counter does not know
    the CPU's fused one)."""
    totals = []
    for batch in (1, 2):
        ids = token_ids(gpt, batch)
        mapping = {aten.convolution_backward: convolution_backward}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            loss = gpt(ids, ids).loss
            forward = counter.get_total_flops()
            assert loss is not None
            loss.backward()
        totals.append((forward, counter.get_total_flops()))
    (forward_1, both_1), (forward_2, both_2) = totals
    return (forward_2 - forward_1) / gpt.config.context, (both_2 - both_1) / gpt.config.context


def has_constant_coefficient(config: ResidualConfig) -> bool:
    """w is a number that nothing trains: then torch skips its gradient, which the convention counts."""
    return (config.rule, config.gate, config.target, config.direction_norm) == (
        "write_only", "constant", "constant", "free",
    )  # fmt: skip


def test_the_grid_covers_every_choice_of_every_rule() -> None:
    assert len(configurations()) > 60
    names = {field.name for field in fields(ResidualConfig)}
    assert {name for name, kind in get_type_hints(ResidualConfig).items() if kind is bool} < CHOICES.keys()
    for name, values in CHOICES.items():
        assert name in names
        for value in values:
            assert any(getattr(config, name) == value for config in configurations()), (name, value)
    assert {config.rule for config in configurations() if config.value_channels == 1} == {*RULES} - {"channels"}
    assert {config.rule for config in configurations() if config.rank > 1} == {"delta", "write_only", "erase_only"}


@pytest.mark.parametrize("part", range(4))
def test_matrix_products_are_those_that_torch_counts(part: int) -> None:
    for residual in configurations()[part::4]:
        gpt = model(residual)
        flops = training_flops_per_token(gpt.config)
        skipped = 2 * 2 * residual.value_channels * 12 * residual.rank if has_constant_coefficient(residual) else 0
        assert products(gpt) == (flops.matrix_forward, 3 * flops.matrix_forward - skipped), residual


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 3},
        {"context": 9},
        {"heads": 3, "head_dim": 8},
        {"qk_norm": False},
        {"out_norm": 1.0},
        {"mlp_dim": 7},
        {"rope_fraction": 0.5},
        {"rope_fraction": 0.0},
        {"dim": 20, "vocab_size": 31},
    ],
)
def test_sizes_of_the_model(sizes: dict[str, int]) -> None:
    gpt = model(replace(PRESETS["paper-cc"], compression="token"), **sizes)
    flops = training_flops_per_token(gpt.config)
    assert products(gpt) == (flops.matrix_forward, 3 * flops.matrix_forward)
    assert_elementwise_agrees(gpt)


class Elementwise(TorchDispatchMode):
    """Element-wise operations under the stated convention, by what each operator reads and writes."""

    FREE = (
        "view", "_unsafe_view", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "clone", "detach",
        "split", "split_with_sizes", "slice", "cat", "constant_pad_nd", "embedding", "convolution", "mm", "addmm",
        "bmm", "baddbmm", "full", "stack", "copy_", "alias", "select", "empty", "new_empty", "new_zeros", "new_full",
        "clamp_min",
    )  # fmt: skip
    ONE_PER_RESULT = (
        "mul", "add", "add_", "sub", "rsub", "div", "pow", "rsqrt", "sqrt", "reciprocal", "sigmoid", "tanh",
    )  # fmt: skip
    SPECIAL: Mapping[str, Callable[[Any, Any], int]] = {
        "sum": lambda args, result: args[0].numel(),
        "mean": lambda args, result: args[0].numel() + result.numel(),
        "linalg_vector_norm": lambda args, result: 2 * args[0].numel() + result.numel(),
        "mv": lambda args, result: 2 * args[0].numel(),
        "silu": lambda args, result: 2 * result.numel(),
        "addcmul": lambda args, result: 2 * result.numel(),
        "_softmax": lambda args, result: 5 * result.numel(),
        "_log_softmax": lambda args, result: 5 * result.numel(),
        "nll_loss_forward": lambda args, result: args[1].numel(),
        # Scale and softmax of every score.
        "_scaled_dot_product_flash_attention_for_cpu": lambda args, result: (
            6 * args[0].shape[0] * args[0].shape[1] * args[0].shape[2] * args[1].shape[2]
        ),
    }

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("add", "add_") and isinstance(args[1], Tensor) and args[1].ndim == 1:
            pass  # a bias, which belongs to the product; torch adds it apart where the input is not contiguous
        elif isinstance(result, Tensor) and (not result.is_floating_point() or (name == "div" and result.ndim == 0)):
            pass  # which labels count, how many, and the one division by that number
        elif name in self.ONE_PER_RESULT:
            self.total += result.numel()
        elif name in self.SPECIAL:
            self.total += self.SPECIAL[name](args, result)
        else:
            assert name in self.FREE, f"how much work is {name}?"
        return result


def assert_elementwise_agrees(gpt: GPT) -> None:
    """Up to single numbers per token: 1 / x is two operations in Python, and a scale may be computed twice."""

    totals, config = [], gpt.config
    for batch in (1, 2):
        ids = token_ids(gpt, batch)
        with Elementwise() as mode, torch.no_grad():
            gpt(ids, ids)
        totals.append(mode.total)
    expected = sum(work.elementwise for work in training_flops_per_token(config).parts.values())
    slack = 2 * config.layers * config.residual.rank * 6
    assert expected - slack <= (totals[1] - totals[0]) / config.context <= expected + slack, config.residual


@pytest.mark.parametrize("part", range(4))
def test_elementwise_work_is_what_the_operators_do(part: int) -> None:
    for residual in configurations()[part::4]:
        assert_elementwise_agrees(model(residual))


def test_hand_computed_additive_and_delta() -> None:
    sizes = {"vocab_size": 256, "context": 64, "layers": 2, "heads": 4, "dim": 128}
    additive = training_flops_per_token(GPTConfig(residual=PRESETS["additive"], **sizes))
    # Four projections, two products of scores, three of SwiGLU (hidden width 341); head.
    block = 4 * 2 * 128 * 128 + 2 * 2 * 64 * 128 + 3 * 2 * 128 * 341
    assert additive.matrix_forward == 2 * block + 2 * 128 * 256
    assert additive.parts["rewrite"].total == 2 * 2 * 128
    assert additive.training == 3 * additive.forward
    delta = training_flops_per_token(GPTConfig(residual=PRESETS["paper-cc"], **sizes))
    # Per sublayer: targets 4 x 128, gate 128, read and outer product of a 4 x 128 state; embedding convolution once.
    assert delta.matrix_forward - additive.matrix_forward == 4 * 2 * (4 * 128 + 128 + 2 * 512) + 2 * 4 * 512


def test_a_missing_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size"):
        training_flops_per_token(GPTConfig())

"""Floating-point operations of the GPT per token, one formula per part, as the forward pass executes them.

Conventions:
- A product of inner size k counts 2k per output (k multiplications, k additions); this covers adding the result to a
  bias or a state. Convolutions likewise, padding included. These are the `matrix` operations, those that
  `torch.utils.flop_counter` counts.
- Everything else is `elementwise`: one per element for an addition, multiplication, division, root, power,
  exponential, sigmoid or tanh; one per element read for a sum; 5 per element for a softmax (maximum, subtraction,
  exponential, sum, division). Copies, look-ups, casts and comparisons are free, so the embedding has no part.
- Attention counts all context x context scores, as the literature and torch's counter do; kernels that skip the
  masked half execute about half of the part "attention scores", for every condition alike.
- Backward is twice forward, for both kinds: each operation has two operands, each needs a gradient, each gradient
  is as much work as the operation. What a fused kernel recomputes in backward is not counted.
- Of a rival only the matrix operations are known, counted by torch as a forward pass runs them.
- Work per step rather than per token (folding convolution weights, clipping, the optimiser) is not counted.

Symbols: D width, V value channels, T context, r rank, K taps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from deepdelta.errors import UserError
from deepdelta.models.building import language_model
from deepdelta.models.gpt import DEEP, GPTConfig
from deepdelta.nn import ResidualConfig
from deepdelta.nn.presets import PRESETS

SOFTMAX = 5
SILU = 2
BACKWARD = 2
"""Backward work as a multiple of forward work."""


@dataclass(frozen=True)
class Work:
    """Operations of one part."""

    matrix: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        return self.matrix + self.elementwise

    def __add__(self, other: "Work") -> "Work":
        return Work(self.matrix + other.matrix, self.elementwise + other.elementwise)

    def __mul__(self, times: int) -> "Work":
        return Work(self.matrix * times, self.elementwise * times)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token."""

    parts: Mapping[str, Work]
    """Forward operations of each part, over all layers."""

    @property
    def forward(self) -> int:
        return sum(work.total for work in self.parts.values())

    @property
    def matrix_forward(self) -> int:
        return sum(work.matrix for work in self.parts.values())

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.forward * (1 + BACKWARD)


def training_flops_per_token(config: GPTConfig) -> Flops:
    """Operations per token of a GPT trained at its full context, by part.

    Raises:
        UserError: `vocab_size` is not set.
    """
    if config.vocab_size is None:
        raise UserError("vocab_size must be set to count the operations of the head; set model.vocab_size.")
    if config.rival is not None:
        plain = replace(config, rival=None, residual=PRESETS["additive"])
        rival = Work(matrix=(_forward_products(config) - _forward_products(plain)) // config.context)
        return Flops({**training_flops_per_token(plain).parts, "rival": rival})
    residual, width = config.residual, config.dim
    norm = rms_norm(width)
    per_block = {
        "compression": compression(residual, width) * 2,
        "norm": (norm if residual.norm == "rms" else Work()) * 2,
        "query": query(residual, width) * 2,
        "attention projections": linear(width, config.heads * config.head_width) * 4,
        "rotary": rotary(config),
        "query-key norm": rms_norm(config.head_width) * (2 * config.heads if config.qk_norm else 0),
        "attention scores": attention_scores(config),
        "mlp": swiglu(width, config.mlp_width),
        "output norm": (Work() if config.out_norm is None else norm) * 2,
        "direction": direction(residual, width) * 2,
        "target": target(residual, width) * 2,
        "gate": gates(residual, width) * 2,
        "rewrite": rewrite(residual, width) * 2,
    }
    once = {
        # The norm of the embeddings, and what it gives added in every repetition.
        "injection": Work() if config.repeats is None else norm + Work(elementwise=width) * config.repeats,
        "expansion": expansion(residual, width),
        "readout": compression(residual, width),
        "final norm": norm,
        "head": linear(width, config.vocab_size),
        # log-softmax, and the sum over tokens.
        "loss": Work(elementwise=SOFTMAX * config.vocab_size + 1),
    }
    return Flops({name: work * config.depth for name, work in per_block.items()} | once)


def _forward_products(config: GPTConfig) -> int:
    """Matrix operations of a forward pass over one context; where all layers do the same, by the first two."""
    if config.layers <= 2 or config.rival in DEEP:
        return _counted(config)
    one, two = (_counted(replace(config, layers=layers)) for layers in (1, 2))
    return one + (config.layers - 1) * (two - one)


@cache
def _counted(config: GPTConfig) -> int:
    """The same, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode  # not above: it imports Triton

    ids = torch.zeros(1, config.context, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        language_model(config)(ids)
    return int(counter.get_total_flops())


def linear(inputs: int, outputs: int) -> Work:
    """W x + b."""
    return Work(matrix=2 * inputs * outputs)


def rms_norm(width: int) -> Work:
    """Square, mean, + eps, rsqrt, scale, weight."""
    return Work(elementwise=4 * width + 3)


def rotary(config: GPTConfig) -> Work:
    """Two products and a sum per rotated feature of q and k."""
    rotated = int(config.head_width * config.rope_fraction) // 2 * 2
    return Work(elementwise=2 * config.heads * 3 * rotated)


def attention_scores(config: GPTConfig) -> Work:
    """q K^T, scaled, softmax, times the values, against all T positions."""
    pairs = config.heads * config.context
    return Work(matrix=2 * 2 * pairs * config.head_width, elementwise=(1 + SOFTMAX) * pairs)


def swiglu(width: int, hidden: int) -> Work:
    """W_o (silu(W_1 c) * W_2 c)."""
    return linear(width, hidden) * 3 + Work(elementwise=(SILU + 1) * hidden)


def expansion(config: ResidualConfig, width: int) -> Work:
    """repeat copies; embedding_conv: K taps per value channel and feature."""
    taps = config.expansion_kernel if config.expansion == "embedding_conv" else 0
    return Work(matrix=2 * taps * config.value_channels * width)


def compression(config: ResidualConfig, width: int) -> Work:
    """channel and channel_conv: a weighted sum over V; token: a convolution that sums over taps and V."""
    size = config.value_channels * width
    if config.compression == "token":
        return Work(matrix=2 * config.compression_kernel * size)
    if config.value_channels == 1:
        return Work()
    return Work(elementwise=2 * size)


def query(config: ResidualConfig, width: int) -> Work:
    """W_q c of unit norm, X q, W_r of that, and the sum with c."""
    if not config.query:
        return Work()
    channels = config.value_channels
    products = linear(width, width) + Work(matrix=2 * channels * width) + linear(channels, width)
    return products + Work(elementwise=(2 * width + 2) + width + width)


def direction(config: ResidualConfig, width: int) -> Work:
    """r vectors (branch output, its maps, or the MLP of the pooled state), and the scale that each is given."""
    if config.rule in ("additive", "channels"):
        return Work()
    # |a|^2, then 1 / sqrt(|a|^2 + offset), and for `operator` its square.
    scalars = {"unit": 3, "operator": 4, "bounded": 3}
    scale = Work()
    # Written along h itself and without an erase term, the target needs no scale.
    if config.direction_norm != "free" and (config.erases or not config.target_carries_branch):
        scale = Work(elementwise=2 * width + scalars[config.direction_norm]) * config.rewrites
    if config.direction == "pooled":
        return scale + pooled(config, width)
    return scale + (linear(width, config.rank * width) if config.rank > 1 else Work())


def pooled(config: ResidualConfig, width: int) -> Work:
    """Pool the value channels, then the two-layer MLP with silu."""
    channels, hidden = config.value_channels, config.direction_hidden
    pool = {
        "mean": Work(elementwise=(channels + 1) * width),
        "flatten": Work(),
        # q^T X scaled (one vector for all tokens, not a matrix product), softmax, weighted sum.
        "attention": Work(matrix=2 * channels * width, elementwise=2 * channels * width + (1 + SOFTMAX) * channels),
    }[config.direction_pool]
    inputs = channels * width if config.direction_pool == "flatten" else width
    return pool + linear(inputs, hidden) + Work(elementwise=SILU * hidden) + linear(hidden, config.rank * width)


def target(config: ResidualConfig, width: int) -> Work:
    """v of the rules that have one; w_h = 1 + W c, with a plain start 1 + W c / sqrt(d), of those that write h; k and w
    of channels."""
    outputs = config.rank * config.value_channels
    if config.uses_target:
        if config.target == "constant":
            return Work()
        work = linear(width, outputs)
        if config.target == "affine" and not config.linear_gating:
            # 1 +, and times v0.
            work += Work(elementwise=2 * outputs)
        if config.target in ("scaled_sigmoid", "magnitude"):
            # Sigmoid and scale; 1 + and, unless written along h, times |h|.
            work += Work(elementwise=(1 if config.target_carries_branch else 2) * outputs)
        if config.target == "magnitude" and not config.target_carries_branch:
            work += Work(elementwise=2 * width + 2) * config.rank
        return work
    if config.rule == "channels":
        # 1 + tanh of V + 1 numbers; sqrt(V) w; |u|^2, its root, and u / |u|.
        channels = config.value_channels
        return linear(width, channels + 1) + Work(elementwise=2 * (channels + 1) + 1 + 3 * channels + 1)
    if config.rule == "two_gate" or (config.writes_branch and config.value_channels > 1):
        return linear(width, outputs) + Work(elementwise=(2 if config.plain_start else 1) * outputs)
    return Work()


def gates(config: ResidualConfig, width: int) -> Work:
    """R sigmoid(g(c)) for r gates (twice for two_gate), g linear or two layers with tanh; times what opens it."""
    if config.rule == "additive":
        return Work()
    opening = Work(elementwise=config.gates) if config.starts_plain else Work()
    if config.gate == "constant":
        return opening
    outputs, hidden = config.rank * config.gates, config.gate_hidden
    if config.gate == "linear":
        logits = linear(width, outputs)
    else:
        logits = linear(width, hidden) + Work(elementwise=hidden) + linear(hidden, outputs)
    return (logits + Work(elementwise=2 * outputs)) * (2 if config.rule == "two_gate" else 1) + opening


def rewrite(config: ResidualConfig, width: int) -> Work:
    """X + k (w^T - b k^T X), r times or per block: read, coefficient, and the outer product that adds as it goes."""
    channels, gate = config.value_channels, config.value_channels if config.gate_per_channel else 1
    if config.rule == "additive" and channels == 1:
        return Work(elementwise=width)
    # At V = 1 both are done element by element.
    read_or_outer = Work(elementwise=2 * width) if channels == 1 else Work(matrix=2 * channels * width)
    work = read_or_outer
    if config.rule == "channels":
        # k^T X; w h - b (k^T X).
        return work + read_or_outer + Work(elementwise=3 * width)
    if config.erases:
        # b s^2; w - b (k^T X).
        work += read_or_outer + Work(elementwise=1 + gate + 2 * channels)
    if config.uses_target:
        # w = beta v, and s w unless it is written along h.
        work += Work(elementwise=(1 if config.target_carries_branch else 2) * channels)
    if config.rule == "two_gate":
        # w = beta w_h.
        work += Work(elementwise=channels)
    return work * config.rewrites

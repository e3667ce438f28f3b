"""The same GPT with another residual than the rewrite; attention, SwiGLU, embedding, norms and head are our own.

Rivals of a package are wrapped as its own documentation or transformer does, at its defaults, and imported when one is
built. Those that no package has are written here: identity hyper-connections, the same with a learned retention of each
stream, and block attention residuals.

Shapes: B batch, T tokens, S streams, N sources, D model width; packages hold streams as (B * S, T, D).
"""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.errors import UserError
from deepdelta.models.attention import Rotary
from deepdelta.models.gpt import (
    Embedding,
    GPTConfig,
    GPTOutput,
    Rival,
    applications,
    head_loss,
    label_loss,
    layer_branches,
)
from deepdelta.nn import RMSNorm, initialise
from deepdelta.nn.linear import Initialised, Linear
from deepdelta.releases import check_tested

STREAMS = 4
BLOCKS = 8
"""Blocks of sublayers whose sums block attention residuals attend to (arXiv 2603.15031)."""
LOW_RANK, LOW_RANK_DIM = 64, 768
"""Inner width of the low-rank maps of x-transformers' attention (its default) and gated multi-stream residuals (it has
none) from this model width up; below it in proportion, so that they keep their share of the parameters."""


class Package(NamedTuple):
    """Where a rival's residual is: the package as it is installed, and the class or prefix of its functions."""

    name: str
    part: str

    def load(self) -> ModuleType:
        check_tested(self.name.replace("-", "_"))
        module = {"x-transformers": "x_transformers.x_transformers"}.get(self.name, self.name.replace("-", "_"))
        with warnings.catch_warnings():
            # x-transformers scripts one function with torch.jit as it is imported.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
            return importlib.import_module(module)


PACKAGES: dict[Rival, Package] = {
    "hyper-connections": Package("hyper-connections", ""),
    "mhc": Package("hyper-connections", "mc_"),
    "dynamic-hyper": Package("x-transformers", "HyperConnection"),
    "gated-multi": Package("x-transformers", "GatedMultiResidual"),
    "gru": Package("x-transformers", "GRUGating"),
    "orthogonal": Package("x-transformers", "OrthogonalResidualUpdate"),
    "mv-split": Package("x-transformers", "MVSplitResidualUpdate"),
    "attention": Package("x-transformers", "Residual"),
}


def rival_problem(rival: Rival) -> str | None:
    """Why a rival cannot run here, or None where it can."""
    package = PACKAGES.get(rival)
    if package is not None and importlib.util.find_spec(package.name.replace("-", "_")) is None:
        return f"the package {package.name} is not installed (extra 'lab')"
    return None


class RivalGPT(nn.Module):
    """Embedding -> streams -> layers, repeated where the configuration says so -> one vector -> norm -> tied head,
    joined by a rival's residuals.

    Args:
        config: `rival` says which; `residual` has no effect.
        seed: draws every parameter, those of packages from torch's generator, which others find as it was.

    Raises:
        UserError: the rival's package is absent, or `vocab_size` or `rival` is not set.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        if config.vocab_size is None or config.rival is None:
            raise UserError(
                f"vocab_size and rival must be set, got {config.vocab_size} and {config.rival}; a model without a "
                "rival is a deepdelta.GPT."
            )
        if (problem := rival_problem(config.rival)) is not None:
            raise UserError(f"rival '{config.rival}' cannot be built: {problem}.")
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, config.embedding_scale)
        self.rotary = Rotary(config.head_width, config.context, config.rope_base, config.rope_fraction)
        branches = [branch for _ in range(config.layers) for branch in layer_branches(config, self.rotary)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body: nn.Module = _body(config.rival, branches, config.dim)
        self.norm = RMSNorm(config.dim)
        self.injection: RMSNorm | None = None if config.repeats is None else RMSNorm(config.dim)
        initialise(self, seed)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"] | None = None,
        *,
        loss_alone: bool = False,
        repeats: int | None = None,
    ) -> GPTOutput:
        """As `GPT.forward`."""
        if input_ids.shape[1] > self.config.context:
            raise UserError(
                f"the model's context is {self.config.context} tokens, got {input_ids.shape[1]}; cut the input."
            )
        x_BTD = self.embedding(input_ids)
        told = None if self.injection is None else self.injection(x_BTD)
        c_BTD = self.norm(self.body(x_BTD, applications(self.config, repeats), told))
        if loss_alone and labels is not None:
            return GPTOutput(None, head_loss(c_BTD, self.embedding.weight, labels))
        logits = F.linear(c_BTD, self.embedding.weight)
        return GPTOutput(logits, None if labels is None else label_loss(logits, labels))


def _body(rival: Rival, branches: list[nn.Module], dim: int) -> nn.Module:
    if rival in ("identity-hyper", "retention"):
        return IdentityHyperConnections(branches, dim, retains=rival == "retention")
    if rival == "block-attention":
        return BlockAttentionResiduals(branches, dim)
    package = PACKAGES[rival]
    if package.name == "x-transformers":
        return XTransformersBody(rival, package, branches, dim)
    expand, wrapped, reduce = streamed(package, (Normed(RMSNorm(dim), branch) for branch in branches), dim)
    return Streamed(expand, *wrapped, reduce)


class Normed(nn.Sequential):
    """F(norm(x)), and what F is called with beside it."""

    def forward(self, x: Float[Tensor, "... D"], **given: Tensor) -> Float[Tensor, "... D"]:  # type: ignore[override]
        norm, branch = self
        return cast(Tensor, branch(norm(x), **given))


def order(sublayers: int, repeats: int, told: Tensor | None) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The sublayers in the order in which a looped GPT applies them; its first is `told` the embeddings."""
    for index in range(sublayers * repeats):
        place = index % sublayers
        yield place, {} if place or told is None else {"told": told}


class Streamed(nn.Sequential):
    """The branches, each after a norm, within the hyper-connections of a package: what expands, them, what reduces."""

    def forward(
        self, x: Float[Tensor, "B T D"], repeats: int = 1, told: Tensor | None = None
    ) -> Float[Tensor, "B T D"]:
        expand, *wrapped, reduce = self
        x = expand(x)
        for place, given in order(len(wrapped), repeats, told):
            x = wrapped[place](x, **given)
        return cast(Tensor, reduce(x))


def streamed(package: Package, branches: Iterable[nn.Module], dim: int) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """What expands to the streams of hyper-connections, the branches with these around them, and what reduces."""
    functions = getattr(package.load(), f"{package.part}get_init_and_expand_reduce_stream_functions")
    wrap, expand, reduce = functions(STREAMS, dim=dim)
    return expand, [wrap(branch=branch, layer_index=index) for index, branch in enumerate(branches)], reduce


class XTransformersBody(nn.Module):
    """The loop of x-transformers' AttentionLayers over its residual classes: prepare, norm, branch, join."""

    def __init__(self, rival: Rival, package: Package, branches: list[nn.Module], dim: int) -> None:
        super().__init__()
        module = package.load()
        kind = getattr(module, package.part)
        rank = min(LOW_RANK, max(1, dim * LOW_RANK // LOW_RANK_DIM))
        self.streams: int = STREAMS if rival in ("dynamic-hyper", "gated-multi") else 1
        options: dict[str, Any] = {"read_gate_rank": rank} if rival == "gated-multi" else {}
        # x-transformers drops the norm before the branch there, since the residual's read is normed.
        self.norms = nn.ModuleList(nn.Identity() if options else RMSNorm(dim) for _ in branches)
        self.branches = nn.ModuleList(branches)
        joins = (kind(dim, layer_index=i, num_residual_streams=STREAMS, **options) for i in range(len(branches)))
        self.joins = nn.ModuleList(joins)
        pools = range(len(branches) if rival == "attention" else 0)
        self.pools = nn.ModuleList(module.AttentionResidual(dim, lora_rank=rank) for _ in pools)
        """What aggregates all states so far into a branch's input, in x-transformers' attention residual."""
        if self.streams > 1:
            self.stream_embedding = nn.Parameter(torch.zeros(self.streams, dim))

    def forward(
        self, x: Float[Tensor, "B T D"], repeats: int = 1, told: Tensor | None = None
    ) -> Float[Tensor, "B T D"]:
        if self.streams > 1:
            x = (x[:, None] + self.stream_embedding[:, None]).flatten(0, 1)
        seen: list[Tensor] = []
        pools = list(self.pools)
        for place, given in order(len(self.branches), repeats, told):
            norm, branch, join = self.norms[place], self.branches[place], self.joins[place]
            x_in, kept, known = join.prepare(x)  # type: ignore[operator]
            if pools:
                seen.append(x_in)
                x_in = pools[place](x_in, seen)
            x = join(branch(norm(x_in), **given), kept, **known)
        return x.view(-1, self.streams, *x.shape[1:]).sum(1) if self.streams > 1 else x


class IdentityHyperConnections(nn.Module):
    """S streams that are read and written by learned weights and never mixed (arXiv 2409.19606 with A_r = I).

    Per sublayer, with n_S the RMS-normed streams: the branch reads sum_S a_S X_S with a = a0 + s tanh(n W_a), and
    X_S' = r_S X_S + b_S h with b = b0 + s tanh(n W_b). At the start W = 0, b0 = 1 and a0 reads stream (sublayer mod S);
    s starts at 0.01. All streams start as the embedding; their sum leaves.

    Args:
        branches: F of each sublayer, over (B, T, D).
        dim: D.
        retains: r = r0 + s tanh(n W_r), r0 = 1 at the start, so that a stream fades or grows as a whole; else r = 1.
    """

    def __init__(self, branches: list[nn.Module], dim: int, *, retains: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Normed(RMSNorm(dim), branch) for branch in branches)
        self.weights = nn.ModuleList(_StreamWeights(dim, index, retains) for index in range(len(branches)))

    def forward(
        self, x: Float[Tensor, "B T D"], repeats: int = 1, told: Tensor | None = None
    ) -> Float[Tensor, "B T D"]:
        x_BTSD = x[..., None, :].expand(*x.shape[:-1], STREAMS, x.shape[-1])
        for place, given in order(len(self.branches), repeats, told):
            read_BTS, write_BTS, *retained = self.weights[place](x_BTSD)
            h_BTD = self.branches[place]((read_BTS[..., None] * x_BTSD).sum(-2), **given)
            for kept_BTS in retained:
                x_BTSD = kept_BTS[..., None] * x_BTSD
            x_BTSD = x_BTSD + write_BTS[..., None] * h_BTD[..., None, :]
        return x_BTSD.sum(-2)


class _StreamWeights(Initialised):
    """The weights with which a sublayer reads, writes and, where it does, retains the streams."""

    weight_decay_exempt = True

    def __init__(self, dim: int, index: int, retains: bool) -> None:
        super().__init__()
        self.index = index
        self.norm = RMSNorm(dim)
        kinds = 3 if retains else 2
        self.map = Linear(dim, kinds, std=0.0)
        self.base = nn.Parameter(torch.empty(kinds, STREAMS))
        self.scale = nn.Parameter(torch.empty(kinds))

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "scale":
            parameter.fill_(0.01)
            return
        parameter.fill_(1.0)
        parameter[0] = torch.eye(STREAMS)[self.index % STREAMS]

    def forward(self, x_BTSD: Tensor) -> tuple[Tensor, ...]:
        moved_BTSK = torch.tanh(self.map(self.norm(x_BTSD))) * self.scale
        return (self.base + moved_BTSK.movedim(-1, -2)).unbind(-2)


class BlockAttentionResiduals(nn.Module):
    """Every sublayer reads a softmax average of block sums instead of one running sum (arXiv 2603.15031).

    Sublayers are cut into at most `BLOCKS` blocks; within a block outputs are added up. Sources are the embedding, the
    sums of the blocks before and the sum so far of this one. A sublayer reads sum_N a_N s_N with
    a = softmax_N(q^T RMSNorm(s_N)), q its own learned vector, 0 at the start; so does the head.
    """

    def __init__(self, branches: list[nn.Module], dim: int) -> None:
        super().__init__()
        self.size = math.ceil(len(branches) / BLOCKS)
        self.branches = nn.ModuleList(Normed(RMSNorm(dim), branch) for branch in branches)
        self.queries = nn.ParameterList(nn.Parameter(torch.zeros(dim)) for _ in range(len(branches) + 1))
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(len(branches) + 1))

    def forward(
        self, x: Float[Tensor, "B T D"], repeats: int = 1, told: Tensor | None = None
    ) -> Float[Tensor, "B T D"]:
        sources = [x]
        for place, given in order(len(self.branches), repeats, told):
            h_BTD = self.branches[place](self._read(place, sources), **given)
            if place % self.size:
                sources[-1] = sources[-1] + h_BTD
            else:
                sources.append(h_BTD)
        return self._read(len(self.branches), sources)

    def _read(self, index: int, sources: list[Tensor]) -> Tensor:
        sources_NBTD = torch.stack(sources)
        logits_NBT: Tensor = self.norms[index](sources_NBTD) @ self.queries[index]
        return (logits_NBT.softmax(0)[..., None] * sources_NBTD).sum(0)

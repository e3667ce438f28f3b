"""The same GPT with other packages' residuals: attention, SwiGLU, embedding, norms and head are those of our own.

Each peer wraps a branch as its own documentation or transformer does, at its package's defaults: multi-stream
residuals with 4 streams, streams repeated at the start and summed at the end.

Shapes: B batch, T tokens, S streams, D model width; peers hold streams as (B * S, T, D).
"""

import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.lab.bench.config import Peer
from deepdelta.models import GPTConfig, GPTOutput
from deepdelta.models.attention import Rotary
from deepdelta.models.gpt import Embedding, label_loss, layer_branches
from deepdelta.nn import RMSNorm, initialise

STREAMS = 4
LOW_RANK = 64
"""Inner width of the low-rank maps of x-transformers' attention (its default) and gated multi-stream residuals (it has
none)."""

X_TRANSFORMERS = {
    "x-transformers-hyper": "HyperConnection",
    "x-transformers-gated-multi": "GatedMultiResidual",
    "x-transformers-gru": "GRUGating",
    "x-transformers-orthogonal": "OrthogonalResidualUpdate",
    "x-transformers-mv-split": "MVSplitResidualUpdate",
    "x-transformers-attention": "Residual",
}
"""The class of x-transformers that joins a branch to the state."""


def peer_problem(peer: Peer) -> str | None:
    """Why a peer cannot run here, or None where it can."""
    if importlib.util.find_spec(_package(peer).replace("-", "_")) is None:
        return f"the package {_package(peer)} is not installed (extra 'lab')"
    return None


class PeerGPT(nn.Module):
    """Embedding -> streams -> layers -> one vector -> norm -> tied head, joined by a peer's residuals."""

    def __init__(self, config: GPTConfig, peer: Peer, seed: int = 0) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embedding = Embedding(config.vocab_size, config.dim, config.embedding_scale)
        self.rotary = Rotary(config.head_width, config.context, config.rope_base, config.rope_fraction)
        branches = [branch for _ in range(config.layers) for branch in layer_branches(config, self.rotary)]
        # Some peers draw their parameters from torch's generator, which others must find as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            build = XTransformersBody if peer in X_TRANSFORMERS else _hyper
            self.body: nn.Module = build(peer, branches, config.dim)
        self.norm = RMSNorm(config.dim)
        initialise(self, seed)

    def forward(self, input_ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"] | None = None) -> GPTOutput:
        c_BTD = self.norm(self.body(self.embedding(input_ids)))
        logits = F.linear(c_BTD, self.embedding.weight)
        return GPTOutput(logits, None if labels is None else label_loss(logits, labels))


class XTransformersBody(nn.Module):
    """The loop of x-transformers' AttentionLayers over its residual classes: prepare, norm, branch, join."""

    def __init__(self, peer: Peer, branches: list[nn.Module], dim: int) -> None:
        super().__init__()
        package = _import(peer)
        kind = getattr(package, X_TRANSFORMERS[peer])
        rank = min(LOW_RANK, dim // 2)
        self.streams: int = STREAMS if peer in ("x-transformers-hyper", "x-transformers-gated-multi") else 1
        options: dict[str, Any] = {"read_gate_rank": rank} if peer == "x-transformers-gated-multi" else {}
        # x-transformers drops the norm before the branch there, since the residual's read is normed.
        self.norms = nn.ModuleList(nn.Identity() if options else RMSNorm(dim) for _ in branches)
        self.branches = nn.ModuleList(branches)
        joins = (kind(dim, layer_index=i, num_residual_streams=STREAMS, **options) for i in range(len(branches)))
        self.joins = nn.ModuleList(joins)
        pools = range(len(branches) if peer == "x-transformers-attention" else 0)
        self.pools = nn.ModuleList(package.AttentionResidual(dim, lora_rank=rank) for _ in pools)
        """What aggregates all states so far into a branch's input, in x-transformers' attention residual."""
        if self.streams > 1:
            self.stream_embedding = nn.Parameter(torch.zeros(self.streams, dim))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        if self.streams > 1:
            x = (x[:, None] + self.stream_embedding[:, None]).flatten(0, 1)
        seen: list[Tensor] = []
        pools = list(self.pools)
        for index, (norm, branch, join) in enumerate(zip(self.norms, self.branches, self.joins, strict=True)):
            x_in, kept, known = join.prepare(x)  # type: ignore[operator]
            if pools:
                seen.append(x_in)
                x_in = pools[index](x_in, seen)
            x = join(branch(norm(x_in)), kept, **known)
        return x.view(-1, self.streams, *x.shape[1:]).sum(1) if self.streams > 1 else x


def _hyper(peer: Peer, branches: list[nn.Module], dim: int) -> nn.Sequential:
    package = _import(peer)
    prefix = "mc_" if peer == "hyper-connections-mhc" else ""
    wrap, expand, reduce = getattr(package, f"{prefix}get_init_and_expand_reduce_stream_functions")(STREAMS, dim=dim)
    wrapped = (
        wrap(branch=nn.Sequential(RMSNorm(dim), branch), layer_index=index) for index, branch in enumerate(branches)
    )
    return nn.Sequential(expand, *wrapped, reduce)


def _package(peer: Peer) -> str:
    return "x-transformers" if peer in X_TRANSFORMERS else "hyper-connections"


def _module_name(peer: Peer) -> str:
    return "x_transformers.x_transformers" if peer in X_TRANSFORMERS else "hyper_connections"


def _import(peer: Peer) -> ModuleType:
    with warnings.catch_warnings():
        # x-transformers scripts one function with torch.jit as it is imported.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return importlib.import_module(_module_name(peer))

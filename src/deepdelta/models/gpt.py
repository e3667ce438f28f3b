"""The reference decoder-only transformer, its residuals made by the same `DeltaStream` that users get.

Shapes: B batch, T tokens, V value channels, D model width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from annotated_types import Ge, Gt, Interval, Le
from jaxtyping import Float, Int
from pydantic import FiniteFloat
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from deepdelta.config import Settings
from deepdelta.errors import UserError
from deepdelta.models.attention import Attention, Rotary, SwiGLU
from deepdelta.nn import DeltaResidual, DeltaStream, ResidualConfig, RMSNorm, initialise
from deepdelta.nn.chain import Link, advance
from deepdelta.nn.input_map import InputMap
from deepdelta.nn.linear import Initialised
from deepdelta.nn.plain import plain
from deepdelta.nn.presets import PRESETS
from deepdelta.ops import accumulation_dtype

LARGEST = 1 << 24
"""The largest size that a model may have in any one direction: products of such can be counted in 64 bits."""
WHOLE_LOGITS, PART_OF_LOGITS = 1 << 26, 1 << 25
"""Up to how many the logits of a batch stand whole, and of how many a part of more consists: 128 MiB in fp32."""
Size = Annotated[int, Ge(1), Le(LARGEST)]
Spread = Annotated[float, Interval(ge=0, le=1e6)]
Rival = Literal[
    "hyper-connections",
    "mhc",
    "identity-hyper",
    "retention",
    "dynamic-hyper",
    "gated-multi",
    "attention",
    "block-attention",
    "gru",
    "orthogonal",
    "mv-split",
]
"""Residuals of others that the same GPT can be built with."""
DEEP: tuple[Rival, ...] = ("attention", "block-attention")
"""Those that keep what every sublayer gave."""


@dataclass(frozen=True, kw_only=True)
class GPTConfig(Settings):
    """Sizes and settings of the GPT; the additive baseline is rule 'additive' at V = 1 with compression 'channel',
    everything else equal."""

    vocab_size: Size | None = None
    """Rows of the embedding; None takes the corpus's vocabulary."""
    context: Size = 256
    """Tokens the model can see."""
    layers: Size = 4
    repeats: Size | None = None
    """A looped GPT: how often the layers are applied one after another, with the same weights. The first attention of
    every repetition sees c + RMSNorm(x), x the embeddings. None: once, and without that."""
    heads: Size = 4
    head_dim: Size | None = None
    """Width of a head; None: dim / heads."""
    dim: Size = 128
    """D, the model width."""
    mlp_dim: Size | None = None
    """Hidden width of the MLP; None: floor(8/3 dim)."""
    rope_base: Annotated[FiniteFloat, Gt(0)] = 10000.0
    rope_fraction: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """Share of each head's features that is rotated."""
    qk_norm: bool = True
    """RMSNorm of q and k per head, after the rotation."""
    out_norm: Annotated[float, Interval(gt=0, le=1e6)] | None = None
    """RMSNorm of what each branch returns, its weight starting at this number; None: no norm. A control: what
    normalising h does without a rewrite."""
    embedding_std: Spread | None = None
    """Embeddings start N(0, embedding_std^2); None: 1 / sqrt(dim). The reference has 0.02, too little for the plain
    residual at widths far below its 768."""
    init_factor: Spread = 0.5
    """Matrices start N(0, (init_factor / sqrt(dim))^2), output projections further / sqrt(depth)."""
    residual: ResidualConfig = field(default_factory=lambda: PRESETS["ddl"])
    rival: Rival | None = None
    """Another residual in place of `residual`, which then has no effect: see `models.rivals`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads * self.head_width > LARGEST:
            raise UserError(f"heads times head_dim must be at most {LARGEST:,}, got {self.heads * self.head_width:,}.")
        if self.head_dim is None and self.dim % self.heads:
            raise UserError(
                f"dim must be a multiple of heads, got dim={self.dim}, heads={self.heads}; or set head_dim."
            )
        if self.rival is None:
            self.residual.check_width(self.dim)
        if self.repeats is not None and self.rival in DEEP:
            raise UserError(
                f"rival '{self.rival}' reads the outputs of all sublayers before, each by weights of its own, so its "
                "layers cannot be repeated: leave repeats out, or choose another."
            )
        if self.depth > LARGEST:
            raise UserError(f"layers times repeats must be at most {LARGEST:,}, got {self.depth:,}.")

    @property
    def depth(self) -> int:
        """Layers that a token goes through, those that are repeated as often as they are."""
        return self.layers * (self.repeats or 1)

    @property
    def stack(self) -> str:
        """The layers in plain English."""
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return layers if self.repeats is None else f"{layers}, repeated: {self.repeats}"

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.heads

    @property
    def mlp_width(self) -> int:
        return self.mlp_dim or math.floor(8 / 3 * self.dim)

    @property
    def embedding_scale(self) -> float:
        return 1 / math.sqrt(self.dim) if self.embedding_std is None else self.embedding_std


Given = tuple[tuple[Any, ...], dict[str, InputMap]]
"""What a layer is called with beside the state: its attention's `remember`, `slots` and `told`, and input maps by the
names of its residuals."""


class GPTOutput(NamedTuple):
    logits: Tensor | None
    """(B, T, vocabulary); None where the loss alone was asked for."""
    loss: Tensor | None
    """`label_loss`; None without labels."""


# So that torch.export can write a program that returns it.
pytree._register_namedtuple(GPTOutput, serialized_type_name="deepdelta.models.gpt.GPTOutput")


def label_loss(logits: Float[Tensor, "B T vocabulary"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats, in fp32 or wider, over the labels other than -1 and -100.

    Where no label counts it is 0, with gradients that are 0.
    """
    wide = logits.flatten(0, 1).to(accumulation_dtype(logits.dtype))
    targets = labels.flatten().long()
    targets = targets.masked_fill(targets == -100, -1)
    total = F.cross_entropy(wide, targets, ignore_index=-1, reduction="sum")
    return total / (targets != -1).sum().clamp(min=1)


def head_loss(
    c_BTD: Float[Tensor, "B T D"], weight: Float[Tensor, "vocabulary D"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """`label_loss` of the logits c W^T, which beyond `WHOLE_LOGITS` numbers are made of some tokens at a time.

    Then they are made twice, for the loss and for its gradient, and never stand whole.
    """
    if labels.numel() * weight.shape[0] <= WHOLE_LOGITS:
        return label_loss(F.linear(c_BTD, weight), labels)
    rows, size = c_BTD.flatten(0, 1), max(1, PART_OF_LOGITS // weight.shape[0])
    targets = labels.flatten().long()
    targets = targets.masked_fill(targets == -100, -1)
    totals = [
        checkpoint(_total, part, weight, wanted, use_reentrant=False, preserve_rng_state=False)
        for part, wanted in zip(torch.split(rows, size), torch.split(targets, size), strict=True)
    ]
    return torch.stack(totals).sum() / (targets != -1).sum().clamp(min=1)


def logits_at_once(tokens: int, vocabulary: int) -> int:
    """How many of the logits of so many tokens stand at one time where the loss alone is asked for."""
    logits = tokens * vocabulary
    return logits if logits <= WHOLE_LOGITS else PART_OF_LOGITS


def _total(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss of some tokens."""
    logits = F.linear(rows, weight)
    return F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), targets, ignore_index=-1, reduction="sum")


class Embedding(nn.Embedding, Initialised):
    """Token vectors, N(0, std^2); the head is tied to them."""

    def __init__(self, vocab_size: int, dim: int, std: float) -> None:
        # Without numbers: nn.Embedding would draw a start from torch's generator.
        super().__init__(vocab_size, dim, _weight=torch.empty(vocab_size, dim))
        self.std = std

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew from a seed drawn of torch's generator, for tools that ask every layer to."""
        initialise(self, int(torch.randint(2**62, (), device="cpu")))

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, self.std, generator=generator)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, std={self.std:.4g}"


def applications(config: GPTConfig, repeats: int | None) -> int:
    """How often the layers are applied: `repeats`, or what the configuration says.

    Raises:
        UserError: repeats below 1, or where the layers are not repeated.
    """
    if repeats is None:
        return config.repeats or 1
    if config.repeats is None:
        raise UserError(
            f"repeats={repeats} is for a looped GPT, and this one's layers are applied once: build it with "
            "GPTConfig(repeats=...)."
        )
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}.")
    return repeats


def layer_branches(config: GPTConfig, rotary: Rotary) -> tuple[nn.Module, nn.Module]:
    """The attention and the MLP of one layer."""
    std = config.init_factor / math.sqrt(config.dim)
    out_std = std / math.sqrt(config.depth)
    attention = Attention(
        config.dim,
        config.heads,
        config.head_width,
        rotary,
        qk_norm=config.qk_norm,
        out_norm=config.out_norm,
        std=std,
        out_std=out_std,
    )
    return attention, SwiGLU(config.dim, config.mlp_width, out_norm=config.out_norm, std=std, out_std=out_std)


class Layer(nn.Module):
    """An attention residual, and the MLP residual that follows it."""

    def __init__(self, config: GPTConfig, stream: DeltaStream, rotary: Rotary) -> None:
        super().__init__()
        attention, mlp = layer_branches(config, rotary)
        self.attention: DeltaResidual = stream.wrap(attention)
        self.mlp: DeltaResidual = stream.wrap(
            mlp,
            share_compression=self.attention if config.residual.compression_sharing == "block" else None,
        )

    def forward(self, state: Float[Tensor, "B T V D"], *memory: Any, **maps: InputMap) -> Float[Tensor, "B T V D"]:
        """The rewritten state; what is given besides is cached decoding's, as `links` has it."""
        return advance(state, self.links(*memory, **maps)).state

    def links(self, *memory: Any, **maps: InputMap) -> list[Link]:
        """The attention, given `memory`, and the MLP; `maps` are input maps by these two names."""
        attention, mlp = ({"input_map": maps[name]} if maps else None for name in ("attention", "mlp"))
        return [Link(self.attention, memory, attention), Link(self.mlp, (), mlp)]


class GPT(nn.Module):
    """Embedding -> expand -> layers, repeated where the configuration says so -> reduce -> norm -> tied head.

    Args:
        config: sizes and residual settings; `vocab_size` must be set.
        seed: every parameter is drawn from a generator keyed by (seed, its name).
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError("vocab_size must be set to build a model; the corpus's vocabulary gives it in training.")
        self.config = config
        self.unused_published: dict[str, Tensor] = {}
        """Tensors of an imported published model that its settings do not use; kept to give them back."""
        self.embedding = Embedding(config.vocab_size, config.dim, config.embedding_scale)
        self.stream = DeltaStream(config.dim, seed=seed, init_factor=config.init_factor, **asdict(config.residual))
        self.rotary = Rotary(config.head_width, config.context, config.rope_base, config.rope_fraction)
        self.layers = nn.ModuleList(Layer(config, self.stream, self.rotary) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.injection: RMSNorm | None = None if config.repeats is None else RMSNorm(config.dim)
        """What each repetition of a looped GPT sees of the embeddings."""
        initialise(self, seed)

    def residuals(self, *, repeated: bool = False) -> list[DeltaResidual]:
        """Every residual in the order of application, once, or as often as it is applied."""
        once = [cast(DeltaResidual, one) for layer in self.layers for one in (layer.attention, layer.mlp)]
        return once * (self.config.repeats or 1) if repeated else once

    def head(self) -> InputMap:
        """How the head reads the state."""
        return InputMap(self.stream.readout, self.norm)

    def read(
        self,
        x: Float[Tensor, "B T D"],
        given: Sequence[Given] | None = None,
        head: InputMap | None = None,
        extend: Callable[[Tensor], Tensor] | None = None,
        *,
        repeats: int | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the head sees of embedded tokens: their state through every residual, read by `head`.

        `given` (of each layer as often as it is applied), `head` and `extend` (what sets the embeddings before into an
        embedding convolution) are those of cached decoding.
        """
        state = self.stream.expand(x) if extend is None else self.stream.expansion(x, extend)
        return advance(state, self.links(self.applied(x, given, repeats)), head or self.head()).read()

    def applied(
        self, x: Float[Tensor, "B T D"], given: Sequence[Given] | None = None, repeats: int | None = None
    ) -> list[tuple[nn.Module, Given]]:
        """The layers in the order in which the tokens embedded as x go through them, with what each is called with."""
        times, layers = applications(self.config, repeats), list(self.layers)
        made = list(given or [((), {})] * (len(layers) * times))
        if self.injection is not None:
            told = self.injection(x)
            for first in range(0, len(made), len(layers)):
                memory, maps = made[first]
                made[first] = (*(memory or (None, None)), told), maps
        return list(zip(layers * times, made, strict=True))

    def links(self, applied: Sequence[tuple[nn.Module, Given]]) -> list[Link]:
        """The residuals as a chain; a layer with hooks, in a wrapper (checkpoints, torch.compile) or sharded, whose
        parameters are whole only while it runs, is one link."""
        links: list[Link] = []
        for layer, (memory, maps) in applied:
            links += layer.links(*memory, **maps) if plain(layer, Layer) else [Link(layer, memory, maps)]
        return links

    def extra_repr(self) -> str:
        links = self.links([(layer, ((), {})) for layer in self.layers])
        apart = {link.module for link in links if not plain(link.module, DeltaResidual)}
        names = [f"{name} ({type(module).__name__})" for name, module in self.named_modules() if module in apart]
        looped = f"{self.config.stack}; " if self.config.repeats else ""
        if not names:
            return f"{looped}each residual opens the next"
        return f"{looped}replaced, wrapped, sharded or with hooks, and so opening their own state: {', '.join(names)}"

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"] | None = None,
        *,
        loss_alone: bool = False,
        repeats: int | None = None,
    ) -> GPTOutput:
        """Logits for every position, and where labels (the next tokens) are given their `label_loss`; on request the
        loss without the logits (`head_loss`).

        Args:
            repeats: of a looped GPT, another number than the configuration's.

        Raises:
            UserError: more tokens than the model's context; repeats below 1, or of a GPT that is not looped.
        """
        if input_ids.shape[1] > self.config.context:
            raise UserError(
                f"the model's context is {self.config.context} tokens, got {input_ids.shape[1]}; cut the input."
            )
        c_BTD = self.read(self.embedding(input_ids), repeats=repeats)
        if loss_alone and labels is not None:
            return GPTOutput(None, head_loss(c_BTD, self.embedding.weight, labels))
        logits = F.linear(c_BTD, self.embedding.weight)
        return GPTOutput(logits, None if labels is None else label_loss(logits, labels))

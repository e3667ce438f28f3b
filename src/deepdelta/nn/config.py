"""Every setting of a delta residual, what it may be, and which settings do not go together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Annotated, Any, Literal

from annotated_types import Interval

from deepdelta.config import Settings
from deepdelta.errors import UserError

Rule = Literal["delta", "write_only", "erase_only", "additive", "additive_erase", "two_gate", "channels"]
Direction = Literal["branch", "pooled"]
Pool = Literal["mean", "flatten", "attention"]
DirectionNorm = Literal["unit", "operator", "bounded", "free"]
Target = Literal["linear", "affine", "scaled_sigmoid", "linear_input", "constant", "magnitude", "branch"]
Gate = Literal["linear", "two_layer", "constant"]
GateRange = Literal[1, 2]
Expansion = Literal["repeat", "embedding_conv"]
Compression = Literal["channel", "channel_conv", "token"]
CompressionInit = Literal["identity", "random"]
CompressionSharing = Literal["sublayer", "block"]
Norm = Literal["rms", "none"]
Width = Annotated[int, Interval(ge=1, le=1 << 20)]
Taps = Annotated[int, Interval(ge=1, le=4096)]
Epsilon = Annotated[float, Interval(ge=1e-15, le=1e3)]
Gating = Annotated[float, Interval(ge=0, le=2)]
Number = Annotated[float, Interval(ge=-1e6, le=1e6)]


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(Settings):
    """How a residual reads, erases and writes; `docs/settings.md` ties each field to its equation.

    The field defaults are those of a residual whose rule is named, without a token axis. A `DeltaStream` without a rule
    has the preset `plain-start`; `paper-cc` is the method in the form of the paper's text.
    """

    rule: Rule = "delta"
    """delta | write_only | erase_only | additive | additive_erase | two_gate (docs/method.md#rules) | channels
    (docs/method.md#across-value-channels)."""
    value_channels: Annotated[int, Interval(ge=1, le=4096)] = None  # type: ignore[assignment]  # __post_init__ puts the rule's own
    """V, the number of width-D vectors that a token's state holds; 4, and 1 with rule additive, unless it is given."""
    rank: Annotated[int, Interval(ge=1, le=64)] = 1
    """Rewrites per residual: r learned maps of h, r targets, r gates, applied in index order."""
    direction: Direction = "branch"
    """branch: k from h = F(c); pooled: k from an MLP over the token's own pooled value channels (v1)."""
    direction_pool: Pool = "mean"
    """How `pooled` pools the value channels."""
    direction_hidden: Width = 128
    """Hidden width of the MLP of `pooled`."""
    direction_norm: DirectionNorm = "unit"
    """unit: h / sqrt(|h|^2 + eps^2); operator: A = I - beta h h^T / (h^T h + eps); bounded: h / sqrt(|h|^2 + D);
    free: h / sqrt(D)."""
    direction_eps: Epsilon = 1e-5
    """eps of `unit` and `operator`, and of `query`; the derivative at h = 0 is 1 / eps."""
    target: Target = "linear"
    """linear: W c; affine: v0 (1 + W c), v0 learned; scaled_sigmoid: scale * sigmoid(W x_in + b); linear_input:
    W x_in + b; constant; magnitude: |h| (1 + W c); branch: W h (v1, where F supplies the target)."""
    target_init: Number = 0.5
    """v0 of `affine` at the start, the same for every value channel."""
    target_scale: Number = 4.0
    """The scale of `scaled_sigmoid`."""
    target_value: Number = 2.0
    """The value of `constant`."""
    gate: Gate = "linear"
    """linear and two_layer: gate_range sigmoid(g(c)), logits in fp32; constant: gate_init itself."""
    gate_range: GateRange = 2
    """R: the most that a learned beta can be, but for the factor that it has where the rule starts plain. With 1, a
    control, I - beta k k^T has no negative eigenvalue for a unit k."""
    gate_init: Gating = 1.0
    """beta at the start, in [0, 2]; strictly within its range unless it is constant."""
    gate_hidden: Width = 128
    """Hidden width of `two_layer`."""
    gate_hidden_bias: bool = True
    """A bias in the first layer of `two_layer` (the text has one, the authors' code none)."""
    gate_per_channel: bool = False
    """One gate per value channel instead of one for all (an extension)."""
    erase_init: Gating = 0.1
    """The erase gate at the start, for rules whose erase has a gate of its own (additive_erase, two_gate); as
    `gate_init`."""
    erase_blocks: Annotated[int, Interval(ge=1, le=1 << 10)] = 1
    """additive_erase cuts the width into so many blocks, each with an erase gate and a direction of its own, the unit
    vector of h's block (an extension)."""
    plain_start: bool = False
    """additive_erase starts as the plain residual X + h, exactly: its erase gate is multiplied by a learned number that
    starts at 0, w_h = 1 + W c / sqrt(d) with W = 0 at the start, and the weights of the compression add up to 1 but
    differ."""
    expansion: Expansion = "repeat"
    """repeat: every value channel is the embedding; embedding_conv: causal depthwise convolution over tokens."""
    expansion_kernel: Taps = 4
    """Taps of `embedding_conv`."""
    compression: Compression = "channel"
    """channel: one weight per feature and channel; channel_conv: the authors' code's factored form of it;
    token: causal depthwise convolution over tokens per feature and channel, then a read vector."""
    compression_kernel: Taps = 4
    """Taps of `token`, over tokens; taps of `channel_conv`, over value channels (at most V)."""
    compression_causal: bool = False
    """`channel_conv` pads on the left only."""
    compression_init: CompressionInit = "identity"
    """identity: the mean over value channels; random: convolution weights drawn as matrices (the authors' code)."""
    compression_sharing: CompressionSharing = "sublayer"
    """For models: block gives both sublayers of a block one compression (the authors' code). A bare stream shares
    where `wrap(share_compression=...)` says so."""
    query: bool = False
    """The branch and the gate see c + W_r (X q), q = W_q c of unit norm: the state, asked by key (an extension)."""
    norm: Norm = "rms"
    """rms: the branch and the gate see c = RMSNorm(x_in); none: they see x_in."""
    norm_eps: Annotated[float, Interval(ge=0, le=1)] = 1e-5
    """eps of that norm."""

    def __post_init__(self) -> None:
        if vars(self)["value_channels"] is None:
            object.__setattr__(self, "value_channels", 1 if self.rule == "additive" else 4)
        super().__post_init__()
        for illegal in ILLEGAL:
            if illegal.holds(self):
                raise UserError(f"{illegal.settings}: {illegal.reason}")
        low, high = LEAST_GATE, self.gate_range - LEAST_GATE
        starts = {"gate_init": self.has_gate, "erase_init": self.has_erase_gate}
        for name in [name for name, used in starts.items() if used and self.gate != "constant"]:
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(
                    f"{name} must lie in [{low:g}, {high:g}] where the gate is learned, got {value!r}: at 0 and "
                    f"{self.gate_range} its slope is 0. "
                    f"The nearest value that learns is {low if value < low else high:g}; gate='constant' "
                    "takes any."
                )

    @property
    def has_gate(self) -> bool:
        """Whether the rule has a gate that starts at `gate_init`."""
        return self.rule not in ("additive", "additive_erase")

    @property
    def has_erase_gate(self) -> bool:
        """Whether the erase has a gate of its own, which starts at `erase_init`."""
        return self.rule in ("additive_erase", "two_gate")

    @property
    def erases(self) -> bool:
        """Whether the rule has an erase term b."""
        return self.rule in ("delta", "erase_only", "additive_erase", "two_gate", "channels")

    @property
    def rewrites(self) -> int:
        """Rewrites of one residual, one after another: its rank, or one for each block."""
        return self.rank * self.erase_blocks

    @property
    def gates(self) -> int:
        """Numbers of one gate: one for each value channel or block that has a gate of its own."""
        return self.value_channels if self.gate_per_channel else self.erase_blocks

    @property
    def writes_branch(self) -> bool:
        """Whether the rule writes h itself, with its size (w = |h| w_h), rather than a target along k."""
        return self.rule in ("additive", "additive_erase", "two_gate", "channels")

    @property
    def starts_plain(self) -> bool:
        """Whether the rule starts as X + h, its gate closed and its value channels weighed in pairs that differ."""
        return self.plain_start or self.rule == "channels"

    @property
    def uses_target(self) -> bool:
        """Whether the rule has a target v."""
        return self.rule in ("delta", "write_only")

    @property
    def linear_gating(self) -> bool:
        """Whether the gate's logit and what is written, where the rule has a map for it, are one linear map of c."""
        return (
            (self.rank, self.erase_blocks, self.direction, self.gate) == (1, 1, "branch", "linear")
            and (self.target in ("linear", "affine") or not self.uses_target)
            and self.direction_norm != "free"
            and (self.rule == "additive_erase" or not self.writes_branch)
        )

    @property
    def target_carries_branch(self) -> bool:
        """Whether the |h| of `magnitude` and the 1 / |h| of a unit direction cancel: the target is written along h."""
        return self.uses_target and self.target == "magnitude" and self.direction_norm == "unit"

    @property
    def needs_tokens(self) -> bool:
        """Whether a part works over a token axis, the one before the value channels."""
        return self.expansion == "embedding_conv" or self.compression == "token"

    def check_width(self, dim: int) -> None:
        """Refuse a width D that this residual cannot have."""
        if dim % self.erase_blocks:
            divisor = next(count for count in range(min(dim, self.erase_blocks), 0, -1) if dim % count == 0)
            raise UserError(f"erase_blocks must divide the width {dim}, got {self.erase_blocks}; {divisor} does.")


LEAST_GATE = 1e-3
"""How near a learned gate may start to 0 and to the end R of its range, where the slope beta (R - beta) / R is 0."""


@dataclass(frozen=True)
class Illegal:
    """A combination of settings that has no meaning, and why."""

    settings: str
    reason: str
    holds: Callable[[Any], bool]


ILLEGAL: tuple[Illegal, ...] = (
    Illegal(
        "value_channels=1 with rule='channels'",
        "one value channel has no others to be read with: k would be 1 whatever its weights; use more value_channels.",
        lambda c: c.value_channels == 1 and c.rule == "channels",
    ),
    Illegal(
        "rule='channels' with rank > 1, direction='pooled', direction_norm other than 'unit' or gate_per_channel=True",
        "its one k is made of c, has unit norm and one gate; leave these four settings at their defaults.",
        lambda c: (
            c.rule == "channels"
            and (c.rank > 1 or c.direction == "pooled" or c.direction_norm != "unit" or c.gate_per_channel)
        ),
    ),
    Illegal(
        "value_channels=1 with expansion='embedding_conv'",
        "one value channel has nothing to expand; use expansion='repeat', or more value_channels.",
        lambda c: c.value_channels == 1 and c.expansion != "repeat",
    ),
    Illegal(
        "value_channels=1 with compression='channel_conv'",
        "one value channel has nothing to compress; use compression='channel', which then does nothing, or 'token', "
        "which is a short convolution before every branch and the readout.",
        lambda c: c.value_channels == 1 and c.compression == "channel_conv",
    ),
    Illegal(
        "compression='channel_conv' with compression_kernel > value_channels",
        "the convolution runs along the value channels; lower compression_kernel.",
        lambda c: c.compression == "channel_conv" and c.compression_kernel > c.value_channels,
    ),
    Illegal(
        "compression_causal=True with a compression other than 'channel_conv'",
        "'channel' weighs every channel and 'token' is causal over tokens already; leave it False.",
        lambda c: c.compression_causal and c.compression != "channel_conv",
    ),
    Illegal(
        "compression='channel' with compression_init='random'",
        "only the convolutions draw their weights; use 'channel_conv' or 'token', or compression_init='identity'.",
        lambda c: c.compression == "channel" and c.compression_init == "random",
    ),
    Illegal(
        "rank > 1 with a rule that writes the branch output",
        "additive, additive_erase and two_gate write h once; use rank=1, or the rule delta, write_only or erase_only.",
        lambda c: c.rank > 1 and c.writes_branch,
    ),
    Illegal(
        "direction='pooled' with a rule that writes the branch output",
        "additive, additive_erase and two_gate write along h itself; use direction='branch'.",
        lambda c: c.direction == "pooled" and c.writes_branch,
    ),
    Illegal(
        "direction='pooled' with a target other than 'branch'",
        "nothing else would use the branch output then; use target='branch' (v1).",
        lambda c: c.direction == "pooled" and c.uses_target and c.target != "branch",
    ),
    Illegal(
        "direction='pooled' with rule='erase_only'",
        "nothing would use the branch output; use direction='branch'.",
        lambda c: c.direction == "pooled" and c.rule == "erase_only",
    ),
    Illegal(
        "direction_norm other than 'unit' with a rule that writes the branch output",
        "those rules write h exactly and erase along the unit direction; use direction_norm='unit'.",
        lambda c: c.direction_norm != "unit" and c.writes_branch,
    ),
    Illegal(
        "gate_per_channel=True with gate='constant'",
        "a constant is the same for every value channel; leave it False.",
        lambda c: c.gate_per_channel and c.gate == "constant",
    ),
    Illegal(
        "erase_blocks > 1 with a rule other than 'additive_erase'",
        "it alone erases along parts of what it writes; leave erase_blocks at 1, or use rule='additive_erase'.",
        lambda c: c.erase_blocks > 1 and c.rule != "additive_erase",
    ),
    Illegal(
        "erase_blocks > 1 with gate_per_channel=True",
        "a gate has one number per block or one per value channel; leave one of the two at its default.",
        lambda c: c.erase_blocks > 1 and c.gate_per_channel,
    ),
    Illegal(
        "plain_start=True with a rule other than 'additive_erase'",
        "no other rule has parts that can start closed and leave X + h; use rule='additive_erase'.",
        lambda c: c.plain_start and c.rule != "additive_erase",
    ),
    Illegal(
        "plain_start=True with compression_init='random'",
        "of value channels that are equal, a random compression does not make the plain network's input; use "
        "compression_init='identity'.",
        lambda c: c.plain_start and c.compression_init == "random",
    ),
    Illegal(
        "gate_per_channel=True with rule='additive'",
        "the additive rule has no gate; leave it False.",
        lambda c: c.gate_per_channel and c.rule == "additive",
    ),
)


NEEDED: Mapping[str, tuple[str, Callable[[ResidualConfig], bool]]] = MappingProxyType(
    {
        "direction_pool": ("direction='pooled'", lambda c: c.direction == "pooled"),
        "direction_hidden": ("direction='pooled'", lambda c: c.direction == "pooled"),
        "target": ("rule='delta'", lambda c: c.uses_target),
        "target_init": ("target='affine'", lambda c: c.uses_target and c.target == "affine"),
        "target_scale": ("target='scaled_sigmoid'", lambda c: c.uses_target and c.target == "scaled_sigmoid"),
        "target_value": ("target='constant'", lambda c: c.uses_target and c.target == "constant"),
        "gate": ("rule='delta'", lambda c: c.has_gate or c.has_erase_gate),
        "gate_range": ("gate='linear'", lambda c: (c.has_gate or c.has_erase_gate) and c.gate != "constant"),
        "gate_init": ("rule='delta'", lambda c: c.has_gate),
        "erase_init": ("rule='additive_erase'", lambda c: c.has_erase_gate),
        "gate_hidden": ("gate='two_layer'", lambda c: c.rule != "additive" and c.gate == "two_layer"),
        "gate_hidden_bias": ("gate='two_layer'", lambda c: c.rule != "additive" and c.gate == "two_layer"),
        "expansion_kernel": ("expansion='embedding_conv'", lambda c: c.expansion == "embedding_conv"),
        "compression_kernel": ("compression='token'", lambda c: c.compression != "channel"),
        "norm_eps": ("norm='rms'", lambda c: c.norm == "rms"),
    }
)
"""Settings of parts that not every residual has: one that has the part, and whether a residual does."""


def refuse_unused(config: ResidualConfig, given: Iterable[str], where: str) -> None:
    """Refuse settings that were given and change nothing of this residual.

    Presets hold such settings, and so do files of a whole residual; `given` names what was given beside them, and where
    it names every field it is such a whole.

    Raises:
        UserError: naming `where` and the setting.
    """
    names = set(given)
    if names >= {field.name for field in fields(ResidualConfig)}:
        return
    for name, (having, used) in NEEDED.items():
        if name in names and not used(config):
            raise UserError(
                f"{where}: {name} has no effect on this residual (rule='{config.rule}'); leave it out, or choose a "
                f"residual that has it, such as one with {having}."
            )

"""What an audit finds, as plain data: `deepdelta audit` writes it as JSON, lab/views shows it.

None stands where a rule has no such thing.
"""

from dataclasses import dataclass

from deepdelta.lab.analysis.comparison import Comparison
from deepdelta.lab.analysis.stored import Stored
from deepdelta.lab.audit.shortcut import Distribution, Shortcut
from deepdelta.models import GPTConfig


@dataclass(frozen=True, kw_only=True)
class Regimes:
    """Fractions of rewrites by strength; they add up to 1.

    The strength of an erase is s = b |k|^2: the rewrite leaves 1 - s of what is read. Of a gate that only writes
    (write_only, the write of two_gate) it is beta itself.
    """

    skip: float
    """0 <= s < 0.1."""
    under_relaxed: float
    """0.1 <= s < 0.9."""
    project: float
    """0.9 <= s <= 1.1."""
    over_relaxed: float
    """1.1 < s <= 1.9."""
    reflect: float
    """1.9 < s <= 2."""
    unstable: float
    """Outside [0, 2], where the shortcut lengthens what lies along k: only a direction longer than 1 or the learned
    factor of `plain_start` can take it there."""


@dataclass(frozen=True, kw_only=True)
class GateAudit:
    """A gate over tokens, over value channels where each has its own, and over the rewrites of a rank above 1."""

    values: Distribution
    histogram: tuple[int, ...]
    """Counts in 20 equal bins over [0, 2]."""
    regimes: Regimes


@dataclass(frozen=True, kw_only=True)
class DiscrepancyAudit:
    """e = k^T X - v with the same k and v before and after a rewrite, over tokens and value channels."""

    rms_before: float
    rms_after: float
    signed_ratio: float | None
    """sum e_after e_before / sum e_before^2. Under the delta rule the mean of 1 - beta |k|^2, weighted by e_before^2:
    negative where the rewrites overshoot. None where every e_before is 0."""


NOT_FINITE = "the loss is not finite"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The change of the loss that an intervention makes, in nats per token: with it minus without."""

    intervention: str
    change: Comparison | None
    """Paired by window; None where the rule lacks the part, or the loss is not finite."""
    remark: str | None
    """Why there is no number."""

    @property
    def loss_change(self) -> float | None:
        """Mean over windows."""
        return None if self.change is None else self.change.mean


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another direction along which a sublayer could erase; see `directions`."""

    name: str
    cosine: float
    """Mean |cos| with the state, over tokens, value channels and, of heads, blocks of the width."""
    chance: float
    """What a random direction would have."""


@dataclass(frozen=True, kw_only=True)
class ResidualAudit:
    """One sublayer. Shares are root mean squares over the tokens whose state is not 0; of a rank above 1 they are of
    all its rewrites together, relative to the state before the first. None where every state is 0."""

    name: str
    gate: GateAudit | None
    """beta; of two_gate the gate of the write, of additive_erase that of the erase."""
    erase_gate: GateAudit | None
    """b of two_gate, whose erase has a gate beside that of the write."""
    discrepancy: DiscrepancyAudit | None
    cosine: Distribution
    """cos(k, X_j), signed, over tokens and value channels; 0 where either vector is 0."""
    absolute_cosine: float
    """Mean |cos(k, X_j)|."""
    direction_norm: float
    """Mean |k|."""
    erased: float | None
    """|k (b k^T X)| / |X|."""
    written: float | None
    """|k w^T| / |X|."""
    changed: float | None
    """|X' - X| / |X|."""
    effects: tuple[Effect, ...]
    alternatives: tuple[Alternative, ...] = ()
    """Empty in audits that were made before these were measured."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What `audit` measures."""

    tokens: int
    windows: int
    window: int
    """Tokens of input that a window has."""
    loss: float
    """Nats per token, nothing replaced."""
    residuals: tuple[ResidualAudit, ...]
    """In the order of application."""
    everywhere: tuple[Effect, ...]
    """Of each intervention on all residuals at once."""
    shortcut: Shortcut | None
    """None for a rule without an erase term: its shortcut is the identity."""


@dataclass(frozen=True, kw_only=True)
class AuditResults(Stored):
    """The findings about a run, with what they depend on: all that audit.json holds."""

    run: str
    step: int
    """Of the checkpoint; 0 for an imported one."""
    model: GPTConfig
    corpus: str
    """What the text is."""
    corpus_sha256: str
    contexts: str
    """How windows were cut from its held-out part."""
    device: str
    started: str
    finished: str
    findings: Findings

"""Records of rewrites, batch after batch, to what an audit says about each residual.

Shapes: `...` tokens, r rank, V value channels, G gates (1, or V), D width, S sampled tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.lab.audit.findings import Alternative, DiscrepancyAudit, Effect, GateAudit, Regimes, ResidualAudit
from deepdelta.lab.audit.shortcut import Distribution, Factor
from deepdelta.lab.measure.rewrites import GATE_BINS, RewriteTotals
from deepdelta.nn import ResidualConfig, RewriteRecord

SKIP, PROJECT, OVER, REFLECT, END = 0.1, 0.9, 1.1, 1.9, 2.0
"""Where the regimes of a strength end: see `Regimes`."""
ROUNDING = 1e-5
"""By how much a strength may leave [0, 2] before it counts as outside."""


@dataclass
class Tally:
    """All records of one residual."""

    config: ResidualConfig
    totals: RewriteTotals = field(default_factory=RewriteTotals)
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    pending: list[RewriteRecord] = field(default_factory=list)
    """The first of a sublayer's r rewrites, until the last has come."""

    def add(self, name: str, record: RewriteRecord) -> None:
        """Count one rewrite of the residual of this name.

        Raises:
            UserError: it holds a number that is not finite.
        """
        if not all(bool(value.isfinite().all()) for value in record if value is not None):
            raise UserError(
                f"the rewrites of '{name}' hold numbers that are not finite, so there is nothing to measure; did the "
                "model's training diverge?"
            )
        self.totals.add(record)
        self._keep("cosine", record.cosine)
        if record.beta is not None:
            self._keep("gate", record.beta)
        if record.erase is not None:
            self._keep("strength", record.erase * record.norm.double().square().unsqueeze(-1))
            if self.config.rule == "two_gate":
                self._keep("erase gate", record.erase)
        self.pending.append(record)
        if len(self.pending) == self.config.rewrites:
            self._measure_shares(self.pending)
            self.pending = []

    def result(self, name: str, effects: tuple[Effect, ...], alternatives: tuple[Alternative, ...]) -> ResidualAudit:
        """Everything about the residual of this name."""
        two_gates = self.config.rule == "two_gate"
        strength = "strength" if self.config.erases and not two_gates else "gate"
        absolute_cosine, direction_norm = self.totals.mean("cosine"), self.totals.mean("norm")
        assert absolute_cosine is not None and direction_norm is not None, "at least one record comes first"
        return ResidualAudit(
            name=name,
            gate=self._gate("gate", strength) if "gate" in self.values else None,
            erase_gate=self._gate("erase gate", "strength") if two_gates else None,
            discrepancy=_discrepancy(self.totals),
            cosine=Distribution.of(self._all("cosine")),
            absolute_cosine=absolute_cosine,
            direction_norm=direction_norm,
            erased=self._share("erased") if self.config.erases else None,
            written=None if self.config.rule == "erase_only" else self._share("written"),
            changed=self._share("changed"),
            effects=effects,
            alternatives=alternatives,
        )

    def _measure_shares(self, records: Iterable[RewriteRecord]) -> None:
        k_rD, written_rV, erased_rV, state_V = [], [], [], None
        for record in records:
            state_V = record.state_norm.double() if state_V is None else state_V
            k_rD.append(record.direction.double())
            written_rV.append(record.write.double())
            read_V = record.read.double()
            erased_rV.append(torch.zeros_like(read_V) if record.erase is None else record.erase.double() * read_V)
        assert state_V is not None
        state, k = state_V.square().sum(-1), torch.stack(k_rD, dim=-2)
        written, erased = torch.stack(written_rV, dim=-2), torch.stack(erased_rV, dim=-2)
        there = state > 0
        for name, coefficients in (("written", written), ("erased", erased), ("changed", written - erased)):
            shares = _squared_size(k, coefficients)[there] / state[there]
            self.values.setdefault(name, []).append(shares.flatten().numpy())

    def _share(self, name: str) -> float | None:
        squares = self._all(name)
        return float(np.sqrt(squares.mean())) if squares.size else None

    def _gate(self, name: str, strength: str) -> GateAudit:
        values = self._all(name)
        histogram, _ = np.histogram(values.clip(0, 2), bins=GATE_BINS, range=(0, 2))
        return GateAudit(
            values=Distribution.of(values),
            histogram=tuple(histogram.tolist()),
            regimes=regimes(self._all(strength)),
        )

    def _keep(self, name: str, values: Tensor) -> None:
        self.values.setdefault(name, []).append(values.float().flatten().numpy())

    def _all(self, name: str) -> np.ndarray:
        return np.concatenate(self.values[name])


def regimes(strength: np.ndarray) -> Regimes:
    """The fraction of strengths in each regime."""
    inside = (strength >= -ROUNDING) & (strength <= END + ROUNDING)

    def fraction(where: np.ndarray) -> float:
        return float((where & inside).mean())

    return Regimes(
        skip=fraction(strength < SKIP),
        under_relaxed=fraction((strength >= SKIP) & (strength < PROJECT)),
        project=fraction((strength >= PROJECT) & (strength <= OVER)),
        over_relaxed=fraction((strength > OVER) & (strength <= REFLECT)),
        reflect=fraction(strength > REFLECT),
        unstable=float((~inside).mean()),
    )


def _discrepancy(totals: RewriteTotals) -> DiscrepancyAudit | None:
    before, after, product = (totals.mean(name) for name in ("before", "after", "product"))
    if before is None or after is None or product is None:
        return None
    return DiscrepancyAudit(
        rms_before=before**0.5, rms_after=after**0.5, signed_ratio=product / before if before else None
    )


def _squared_size(k_rD: Tensor, coefficients_rV: Tensor) -> Tensor:
    """|sum_i k_i a_i^T|^2 (...) = sum_ij (k_i^T k_j) (a_i^T a_j), without the V x D matrices."""
    gram_rr = (k_rD @ k_rD.mT) * (coefficients_rV @ coefficients_rV.mT)
    return gram_rr.sum((-2, -1)).clamp(min=0)


class Sampler:
    """The erases of some tokens, evenly spread over all tokens in the order in which batches come.

    Args:
        tokens: how many tokens come in all.
        sample: S, how many of them are kept; all of them where there are fewer.
    """

    def __init__(self, tokens: int, sample: int) -> None:
        count = min(sample, tokens)
        self.positions = torch.arange(count) * tokens // count
        self.seen = 0
        self.chosen = torch.empty(0, dtype=torch.long)
        self.parts: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
        self.order = 0

    def advance(self, tokens: int) -> None:
        """The records that follow are of the next `tokens` tokens."""
        local = self.positions - self.seen
        self.chosen = local[(local >= 0) & (local < tokens)]
        self.seen += tokens
        self.order = 0

    def add(self, name: str, record: RewriteRecord) -> None:
        """Keep the chosen tokens' k and b of a rewrite; one without an erase is the identity."""
        if record.erase is None:
            return
        k_SD, b_SG = record.direction.flatten(0, -2)[self.chosen], record.erase.flatten(0, -2)[self.chosen]
        self.parts.setdefault((self.order, name), []).append((k_SD, b_SG))
        self.order += 1

    def factors(self) -> list[Factor]:
        """One per rewrite, in the order of application."""
        return [
            Factor(name, torch.cat([k for k, _ in parts]), torch.cat([b for _, b in parts]))
            for (_, name), parts in self.parts.items()
        ]

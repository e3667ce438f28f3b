"""What the rewrites of a trained model do, summed over batches as they come from the recorder."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepdelta.models import GPT
from deepdelta.nn import RewriteRecord, recording

GATE_BINS = 20
"""A gate histogram counts gates in this many equal bins over [0, 2]."""


@dataclass
class RewriteTotals:
    """Sums over tokens (and value channels) of one residual."""

    gates: Tensor = field(default_factory=lambda: torch.zeros(GATE_BINS, dtype=torch.float64))
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, record: RewriteRecord) -> None:
        """Count one rewrite. The discrepancy after is that of the state it leaves behind: k^T X' - v with
        k^T X' = k^T X + |k|^2 (w - b k^T X)."""
        if record.beta is not None:
            beta = record.beta.double().cpu()
            # Those that start closed are a factor times a gate, and may leave [0, 2]: the bins at its ends hold them.
            self.gates += torch.histc(beta.clamp(0, 2), bins=GATE_BINS, min=0.0, max=2.0)
            self._sum("gate", beta)
        if record.target is not None and record.beta is not None:
            read, target = record.read.double(), record.target.double()
            square = record.norm.double().square().unsqueeze(-1)
            erased = 0.0 if record.erase is None else record.erase.double() * read
            after = read + square * (record.write.double() - erased)
            self._sum("before", (read - target).square())
            self._sum("after", (after - target).square())
            self._sum("product", (read - target) * (after - target))
        self._sum("norm", record.norm.double())
        self._sum("cosine", record.cosine.double().abs())
        self._sum("state_norm", record.state_norm.double())

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if name in self.sums else None

    def _sum(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + values.sum().item()
        self.counts[name] = self.counts.get(name, 0) + values.numel()


@torch.no_grad()
def rewrite_totals(
    model: GPT, batches: Iterable[Tensor], into: dict[str, RewriteTotals] | None = None
) -> dict[str, RewriteTotals]:
    """Totals per residual, by its name in the model, over batches of token ids (B, T); added to `into` where given."""
    totals = {} if into is None else into

    def collect(name: str, record: RewriteRecord) -> None:
        totals.setdefault(name, RewriteTotals()).add(record)

    with recording(model, collect):
        for ids in batches:
            model(ids)
    return totals

"""The record of a finished run: of a study's training run or of a task's run. What has one is never run again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deepdelta.lab.analysis.results import CurvePoint, RewriteSummary, Sample


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run. Times are ISO 8601, losses nats per token.

    Fields:
        name: of the run directory too. experiment: the study or the task that it belongs to.
        settings: all that decides the numbers besides `inputs`; of a training run as `canonical` gives them.
        inputs: of a training run the hashes of corpus and tokenizer, how contexts were cut for the final validation
            (`contexts`), and the settings of the run whose weights it started from (`start`, null for new weights).
        metrics: by name, null where not finite; of a training run `validation_loss`, `validation_tokens` and `steps`,
            of one that diverged the steps alone.
        diverged: how its training went where the loss was no longer finite.
        seconds: of training steps, up to the last one made; of a task's run all of it.
        commit, versions, machine, threads: of the run's first start.
        sample: of a training run that kept a tokenizer.
    """

    name: str
    kind: Literal["training", "task"]
    experiment: str
    condition: str
    seed: int
    settings: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None]
    diverged: str | None = None
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    rewrites: tuple[RewriteSummary, ...] = ()
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, str]
    threads: int
    finished: str
    sample: Sample | None = None

    @property
    def validation_loss(self) -> float | None:
        """Of a training run; None where it diverged."""
        return self.metrics.get("validation_loss")

    @property
    def validation_tokens(self) -> int:
        return int(self.metrics.get("validation_tokens") or 0)

    @property
    def contexts(self) -> str:
        return str(self.inputs["contexts"])


def merged_rewrites(records: Sequence[RunRecord]) -> tuple[RewriteSummary, ...]:
    """The summaries of several runs of one condition as one: counts added, means averaged, root mean squares too."""
    grouped: dict[tuple[int, str], list[RewriteSummary]] = {}
    for record in records:
        for rewrite in record.rewrites:
            grouped.setdefault((rewrite.layer, rewrite.sublayer), []).append(rewrite)
    return tuple(_merged(group) for group in grouped.values())


def _merged(group: Sequence[RewriteSummary]) -> RewriteSummary:
    def mean(name: str, power: int = 1) -> float | None:
        values = [value for one in group if (value := getattr(one, name)) is not None]
        return (sum(value**power for value in values) / len(values)) ** (1 / power) if values else None

    histograms = [one.gate_histogram for one in group if one.gate_histogram is not None]
    return RewriteSummary(
        layer=group[0].layer,
        sublayer=group[0].sublayer,
        gate_histogram=tuple(map(sum, zip(*histograms, strict=True))) if histograms else None,
        gate_mean=mean("gate_mean"),
        discrepancy_before=mean("discrepancy_before", 2),
        discrepancy_after=mean("discrepancy_after", 2),
        direction_norm=mean("direction_norm"),
        cosine=mean("cosine"),
        state_norm=mean("state_norm"),
    )

"""Loss against compute: a power law per condition over the sizes of a study, and the gap it foretells.

Legend of shapes: Z sizes, S seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepdelta.config import to_plain
from deepdelta.errors import UserError
from deepdelta.files import write_json
from deepdelta.studies.config import Extrapolate
from deepdelta.studies.results import StudyResults
from deepdelta.studies.statistics import CONFIDENCE, Interval

Array = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Law:
    """L = floor + scale (C / unit)^-exponent, with the `unit` of compute about which it was fitted."""

    scale: float
    exponent: float
    floor: float
    unit: float

    def loss(self, flops: float) -> float:
        return self.floor + self.scale * math.pow(flops / self.unit, -self.exponent)


@dataclass(frozen=True, kw_only=True)
class ScalingResult:
    """The fit of one condition. Intervals are 95 % over resampled seeds.

    Fields:
        flops, losses: per size, training FLOPs of a run and mean loss in nats per token over `seeds`.
        at: foretold loss at the stated compute. gap: that minus the baseline's; None for the baseline.
    """

    condition: str
    seeds: tuple[int, ...]
    flops: tuple[float, ...]
    losses: tuple[float, ...]
    law: Law
    exponent: Interval
    at: float
    at_interval: Interval
    gap: float | None
    gap_interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """All fits of a study; `target` is the compute in FLOPs that they are carried to."""

    name: str
    baseline: str
    sizes: tuple[str, ...]
    target: float
    fits: tuple[ScalingResult, ...]


def fit(flops: Sequence[float] | Array, losses: Sequence[float] | Array, *, floor: bool) -> Law:
    """The law with the least squared error of log L.

    Without a floor this is linear regression of log L on log C. With one, floor >= 0 and exponent > 0 are found by
    bounded least squares from that line, started at several floors, the best end taken.

    Raises:
        UserError: fewer sizes than 2, or than 3 with a floor, or compute or losses that are not above 0.
    """
    compute, loss = np.asarray(flops, float), np.asarray(losses, float)
    if len(set(compute.tolist())) < 2 + floor or len(compute) != len(loss):
        raise UserError(f"a fit needs at least {2 + floor} sizes with different compute, got {compute.tolist()}.")
    if not (np.isfinite(compute).all() and np.isfinite(loss).all() and (compute > 0).all() and (loss > 0).all()):
        raise UserError("a fit needs compute and losses above 0.")
    unit = math.exp(float(np.log(compute).mean()))
    x = np.log(compute / unit)
    slope, level = np.polyfit(x, np.log(loss), 1)
    if not floor:
        return Law(scale=math.exp(level), exponent=-float(slope), floor=0.0, unit=unit)
    from scipy.optimize import least_squares  # here: the command line must start fast

    least = float(loss.min())
    ends = []
    for share in (0.0, 0.3, 0.6, 0.9):
        rest = np.polyfit(x, np.log(loss - share * least), 1)
        start = (rest[1], max(-rest[0], 1e-3), share * least)
        ends.append(
            least_squares(
                lambda p: np.log(p[2] + np.exp(p[0] - p[1] * x)) - np.log(loss),
                start,
                bounds=((-np.inf, 0.0, 0.0), (np.inf, np.inf, least)),
                x_scale=(1.0, 0.1, least),
                xtol=1e-12,
                ftol=1e-12,
                gtol=1e-12,
            )
        )
    best = min(ends, key=lambda end: float(end.cost)).x
    return Law(scale=math.exp(best[0]), exponent=float(best[1]), floor=float(best[2]), unit=unit)


def scaling(studies: Mapping[str, StudyResults], name: str, extrapolate: Extrapolate) -> Scaling:
    """Fits per condition over the sizes, on the seeds that it and the baseline finished at every size.

    Seeds are resampled with replacement (a fixed generator), the same ones for all sizes and for the baseline, whose
    runs are paired; every resample is fitted anew, and intervals hold the central 95 % of what comes out.

    Args:
        studies: the results by size.

    Raises:
        UserError: a condition without a seed that it shares with the baseline at all sizes.
    """
    results = list(studies.values())
    baseline = results[0].baseline
    fits = []
    for condition in results[0].conditions:
        names = (condition.name, baseline)
        seeds = tuple(
            seed for seed in results[0].seeds if all(seed in r.condition(n).losses() for r in results for n in names)
        )
        if not seeds:
            raise UserError(f"{condition.name} and {baseline} finished no seed at every size, so there is no fit.")
        compute = {n: [_flops(r, n) for r in results] for n in names}
        losses_ZS = {n: np.array([[r.condition(n).losses()[s] for s in seeds] for r in results]) for n in names}

        fitted: dict[tuple[int, ...], dict[str, Law]] = {}

        def laws(
            chosen: tuple[int, ...],
            compute: Mapping[str, list[float]] = compute,
            losses_ZS: Mapping[str, Array] = losses_ZS,
            fitted: dict[tuple[int, ...], dict[str, Law]] = fitted,
        ) -> dict[str, Law]:
            # Few seeds have few different resamples: each is fitted once.
            if chosen not in fitted:
                fitted[chosen] = {
                    n: fit(compute[n], losses_ZS[n][:, chosen].mean(1), floor=extrapolate.floor) for n in compute
                }
            return fitted[chosen]

        draw = np.random.default_rng(0)
        samples = [laws(tuple(sorted(draw.integers(len(seeds), size=len(seeds)).tolist()))) for _ in range(RESAMPLES)]
        whole = laws(tuple(range(len(seeds))))
        own, other = whole[condition.name], whole[baseline]
        target = extrapolate.flops
        is_baseline = condition.name == baseline
        fits.append(
            ScalingResult(
                condition=condition.name,
                seeds=seeds,
                flops=tuple(compute[condition.name]),
                losses=tuple(losses_ZS[condition.name].mean(1).tolist()),
                law=own,
                exponent=_central([sample[condition.name].exponent for sample in samples]),
                at=own.loss(target),
                at_interval=_central([sample[condition.name].loss(target) for sample in samples]),
                gap=None if is_baseline else own.loss(target) - other.loss(target),
                gap_interval=None
                if is_baseline
                else _central([s[condition.name].loss(target) - s[baseline].loss(target) for s in samples]),
            )
        )
    return Scaling(name=name, baseline=baseline, sizes=tuple(studies), target=extrapolate.flops, fits=tuple(fits))


def save_scaling(found: Scaling, path: Path) -> None:
    """Write `scaling.json` atomically."""
    write_json(path, to_plain(found))


def _flops(results: StudyResults, name: str) -> float:
    """Training FLOPs of a run of the condition at the study's first budget."""
    condition = results.condition(name)
    steps = condition.runs[0].steps or results.budget.steps
    return steps * results.budget.tokens_per_step * condition.flops_per_token


def _central(values: Sequence[float]) -> Interval:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))

"""Loss against compute: a power law per condition over the sizes of a study, the gap it foretells, and how differences
change from size to size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deepdelta.errors import UserError
from deepdelta.lab.analysis.comparison import Estimate
from deepdelta.lab.analysis.results import Extrapolate, Measurements, StudyResults
from deepdelta.lab.analysis.statistics import estimate, load_scipy
from deepdelta.lab.analysis.stored import Stored
from deepdelta.provenance import now, provenance

Array = NDArray[np.float64]


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
    """The fit of one condition.

    Fields:
        flops, losses: per size, training FLOPs of a run and mean loss in nats per token over `seeds`.
        law: fitted to these means. Estimates come from a law of its own for every seed.
        at: foretold loss at the stated compute. gap: that minus the baseline's; None for the baseline.
        gap_of_largest: the gap by laws through the two largest sizes alone; None for the baseline and with two sizes.
    """

    condition: str
    seeds: tuple[int, ...]
    flops: tuple[float, ...]
    losses: tuple[float, ...]
    law: Law
    exponent: Estimate
    at: Estimate
    gap: Estimate | None
    gap_of_largest: Estimate | None


@dataclass(frozen=True, kw_only=True)
class EffectiveSpeed:
    """What a condition's loss is worth: the compute with which the baseline has it, over what it has at that size,
    interpolated in ln C, times the condition's speed as a share of the baseline's.

    Fields:
        bound: the loss is lower than all of the baseline's (the true ratio is above the one given, by the largest size)
            or higher (below it, by the smallest).
    """

    ratio: float
    bound: Literal["above", "below"] | None = None


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How a difference changes with compute: its slope over ln C, C the baseline's training FLOPs, in nats.

    Fields:
        differences: condition minus reference, mean over `seeds` at each size.
        slope: by a line of least squares for every seed; negative: the condition gains on the reference.
        effective_speed: per size; None where the reference is another, speed was not measured, runs do not have the
            same tokens, sizes differ in more than how many these are, or the baseline does not gain by them.
    """

    condition: str
    reference: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    slope: Estimate
    effective_speed: tuple[EffectiveSpeed | None, ...]


@dataclass(frozen=True, kw_only=True)
class Scaling(Stored):
    """All fits of a study; `target` is the compute in FLOPs that they are carried to. Times are ISO 8601."""

    name: str
    baseline: str
    finished: str
    sizes: tuple[str, ...]
    target: float
    fits: tuple[ScalingResult, ...]
    trends: tuple[Trend, ...] = ()


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
    least = float(loss.min())
    ends = []
    for share in (0.0, 0.3, 0.6, 0.9):
        rest = np.polyfit(x, np.log(loss - share * least), 1)
        start = (rest[1], max(-rest[0], 1e-3), share * least)
        ends.append(
            load_scipy().optimize.least_squares(
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


def scaling(studies: Mapping[str, StudyResults], name: str, extrapolate: Extrapolate, *, command: str) -> Scaling:
    """Fits per condition over the sizes, on the seeds that it and the baseline finished at every size.

    Every seed is fitted by itself, and so is the baseline's run of the same seed: what is estimated is a mean over
    seeds, its interval Student's t. (Resampling so few seeds gives intervals that are too narrow.)

    Args:
        studies: the results by size.
        command: the command that was typed, kept with the fits.

    Raises:
        UserError: a condition without a seed that it shares with the baseline at all sizes.
    """
    results = list(studies.values())
    baseline = results[0].baseline
    largest_two = sorted(results, key=lambda one: _flops(one, baseline))[-2:]
    fits = []
    for condition in results[0].conditions:
        names = (condition.name, baseline)
        seeds = tuple(
            seed for seed in results[0].seeds if all(seed in r.condition(n).losses() for r in results for n in names)
        )
        if not seeds:
            raise UserError(f"{condition.name} and {baseline} finished no seed at every size, so there is no fit.")
        own, other = (_fits(results, name, seeds, extrapolate.floor) for name in names)
        foretold = [law.loss(extrapolate.flops) for law in own]
        gaps = largest = None
        if condition.name != baseline:
            gaps = [mine - law.loss(extrapolate.flops) for mine, law in zip(foretold, other, strict=True)]
            if len(results) > 2:
                pairs = zip(*(_fits(largest_two, name, seeds, False) for name in names), strict=True)
                largest = [mine.loss(extrapolate.flops) - theirs.loss(extrapolate.flops) for mine, theirs in pairs]
        flops, losses = _points(results, condition.name, seeds)
        means = [sum(at_size) / len(seeds) for at_size in losses]
        fits.append(
            ScalingResult(
                condition=condition.name,
                seeds=seeds,
                flops=tuple(flops),
                losses=tuple(means),
                law=fit(flops, means, floor=extrapolate.floor),
                exponent=estimate([law.exponent for law in own]),
                at=estimate(foretold),
                gap=None if gaps is None else estimate(gaps),
                gap_of_largest=None if largest is None else estimate(largest),
            )
        )
    return Scaling(
        name=name,
        baseline=baseline,
        **provenance(command),
        finished=now(),
        sizes=tuple(studies),
        target=extrapolate.flops,
        fits=tuple(fits),
        trends=_trends(results),
    )


def _trends(results: Sequence[StudyResults]) -> tuple[Trend, ...]:
    """Of every contrast at the first budget, on the seeds that it has at all sizes."""
    x = np.log([_flops(one, one.baseline) for one in results])
    by_size = [
        {(one.condition, one.reference): one.differences for one in own.contrasts if one.budget == own.budgets[0]}
        for own in results
    ]
    found = []
    for pair in by_size[0]:
        seeds = tuple(seed for seed in results[0].seeds if all(seed in size.get(pair, {}) for size in by_size))
        if not seeds:
            continue
        values = [[size[pair][seed] for size in by_size] for seed in seeds]
        slopes = np.polyfit(x, np.transpose(values), 1)[0].tolist()
        means = tuple(float(mean) for mean in np.mean(values, axis=0))
        found.append(
            Trend(
                condition=pair[0],
                reference=pair[1],
                seeds=seeds,
                differences=means,
                slope=estimate(slopes),
                effective_speed=tuple(_effective_speed(results, *pair, seeds, place) for place in range(len(results))),
            )
        )
    return tuple(found)


def _effective_speed(
    results: Sequence[StudyResults], name: str, reference: str, seeds: Sequence[int], place: int
) -> EffectiveSpeed | None:
    baseline = results[0].baseline
    alike = {(one.condition(baseline).flops_per_token, one.budget.tokens_per_step, one.budgets[0]) for one in results}
    cost = results[place].condition(name).cost
    if reference != baseline or len(alike) > 1 or results[0].budgets[0] != "tokens" or cost is None:
        return None
    flops, losses = _points(results, baseline, seeds)
    order = np.argsort(flops)
    x, ladder = np.log(flops)[order], np.mean(losses, axis=1)[order]
    loss = float(np.mean(_points(results, name, seeds)[1][place]))
    if (np.diff(ladder) >= 0).any():
        return None
    as_good = float(np.interp(loss, ladder[::-1], x[::-1]))  # at the ends what is beyond them
    bound: Literal["above", "below"] | None = "above" if loss < ladder[-1] else "below" if loss > ladder[0] else None
    return EffectiveSpeed(ratio=math.exp(as_good - math.log(flops[place])) * cost.speed_ratio, bound=bound)


def _points(results: Sequence[Measurements], name: str, seeds: Sequence[int]) -> tuple[list[float], list[list[float]]]:
    """Per size, training FLOPs of a run of the condition at the study's first budget, and its losses by seed."""
    by_size = [one.condition(name).losses() for one in results]
    return [_flops(one, name) for one in results], [[by_seed[seed] for seed in seeds] for by_seed in by_size]


def _flops(results: Measurements, name: str) -> float:
    condition, budget = results.condition(name), results.budget
    return (condition.runs[0].steps or budget.steps) * budget.tokens_per_step * condition.flops_per_token


def _fits(results: Sequence[Measurements], name: str, seeds: Sequence[int], floor: bool) -> list[Law]:
    """A law for every seed."""
    flops, losses = _points(results, name, seeds)
    return [fit(flops, of_seed, floor=floor) for of_seed in zip(*losses, strict=True)]

"""The picture of a study as one SVG: changes with their intervals, and loss against FLOPs and time."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from deepdelta.lab.analysis.comparison import Interval
from deepdelta.lab.analysis.results import ConditionResult, StudyResults
from deepdelta.lab.views.figures import Axis, Look, axes, looks
from deepdelta.lab.views.page import template
from deepdelta.lab.views.tables import si

WIDTH, LABEL, PLOT = 900.0, 230.0, 560.0
"""Of the picture, of the names at the left, and of what is drawn, in pixels."""
ROW, HEAD, HEIGHT, KEY, GAP = 26.0, 44.0, 250.0, 18.0, 20.0
"""Height of a condition's row, of a title with its axis, of a panel of curves, of a name, and of what is between."""
SHOWN = 0.15
"""Share of a run after which curves are drawn: the start would flatten the rest."""

Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A condition's change from the baseline, in pixels from the left: a dot per seed, the mean, its interval."""

    name: str
    text: str
    look: Look
    y: float
    dots: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    name: str
    look: Look
    points: tuple[tuple[float, float], ...]

    @property
    def path(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Ticks are places with what stands there."""

    title: str
    y: float
    bottom: float
    ticks_x: tuple[tuple[float, str], ...]
    ticks_y: tuple[tuple[float, str], ...] = ()
    rows: tuple[Row, ...] = ()
    zero: float | None = None
    curves: tuple[Curve, ...] = ()


def plot(results: StudyResults) -> str:
    """The picture; it carries its own style and loads nothing.

    Raises:
        UserError: the extra `study` is not installed.
    """
    panels: list[Panel] = []
    y = 70.0
    if (changes := _changes(results, y)) is not None:
        panels.append(changes)
        y = changes.bottom + HEAD + GAP
    for axis in axes(results):
        if axis.key != "steps" and (curves := _curves(results, axis, y)) is not None:
            panels.append(curves)
            y = curves.bottom + HEAD + GAP
    sizes = {"width": WIDTH, "label": LABEL, "plot": PLOT, "height": y - GAP, "key": KEY}
    return template("plot.svg")(results=results, panels=panels, **sizes)


def _changes(results: StudyResults, y: float) -> Panel | None:
    comparisons = {one.condition: one.comparison for one in results.against_baseline()}
    if not comparisons:
        return None
    baseline = results.condition(results.baseline).losses()
    seeds = {
        name: [loss - baseline[seed] for seed, loss in results.condition(name).losses().items() if seed in baseline]
        for name in comparisons
    }
    ends = [0.0, *(change for own in seeds.values() for change in own)]
    ends += [end for one in comparisons.values() if one.t_interval for end in _ends(one.t_interval)]
    x = _scale(min(ends), max(ends), LABEL, LABEL + PLOT)
    rows = tuple(
        Row(
            name=name,
            text=f"{one.mean:+.3f}"
            + (f" ({one.t_interval.low:+.3f} to {one.t_interval.high:+.3f})" if one.t_interval else ""),
            look=looks(results)[name],
            y=y + HEAD / 2 + ROW * (number + 0.5),
            dots=tuple(map(x, seeds[name])),
            mean=x(one.mean),
            interval=None if one.t_interval is None else (x(one.t_interval.low), x(one.t_interval.high)),
        )
        for number, (name, one) in enumerate(comparisons.items())
    )
    return Panel(
        title=f"Validation loss minus that of {results.baseline}, nats per token, at equal {results.budgets[0]}",
        y=y,
        bottom=y + HEAD / 2 + ROW * len(rows),
        ticks_x=tuple((x(value), f"{value:+g}" if value else "0") for value in _ticks(min(ends), max(ends))),
        rows=rows,
        zero=x(0.0),
    )


def _curves(results: StudyResults, axis: Axis, y: float) -> Panel | None:
    """Training loss, the mean over seeds where all finished ones have a point."""
    means = {one.name: points for one in results.conditions if (points := _mean_curve(one, axis, results.budget.steps))}
    if not means:
        return None
    losses = [loss for points in means.values() for _, loss in points]
    far = max(place for points in means.values() for place, _ in points)
    bottom = y + max(HEIGHT, HEAD / 2 + KEY * len(means))
    x, down = _scale(0.0, far, LABEL, LABEL + PLOT), _scale(min(losses), max(losses), bottom, y + HEAD / 2)
    return Panel(
        title=f"Training loss against {axis.title}, mean over seeds",
        y=y,
        bottom=bottom,
        ticks_x=tuple((x(value), si(value) if value else "0") for value in _ticks(0.0, far)),
        ticks_y=tuple((down(value), f"{value:g}") for value in _ticks(min(losses), max(losses))),
        curves=tuple(
            Curve(name=name, look=looks(results)[name], points=tuple((x(place), down(loss)) for place, loss in points))
            for name, points in means.items()
        ),
    )


def _mean_curve(condition: ConditionResult, axis: Axis, steps: int) -> list[tuple[float, float]]:
    runs = [
        {point.step: point for point in run.curve if point.train_loss is not None}
        for run in condition.runs
        if run.validation_loss is not None
    ]
    shared = [step for step in runs[0] if step >= SHOWN * steps and all(step in run for run in runs)] if runs else []
    return [
        (
            math.fsum(axis.position(condition, run[step]) for run in runs) / len(runs),
            math.fsum(run[step].train_loss or 0.0 for run in runs) / len(runs),
        )
        for step in shared
    ]


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """From [low, high] to pixels, a little room at both ends."""
    margin = 0.03 * (end - start)
    return lambda value: start + margin + (end - start - 2 * margin) * (value - low) / ((high - low) or 1.0)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], about five."""
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]

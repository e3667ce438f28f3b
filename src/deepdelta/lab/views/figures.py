"""The pictures of a study.

A condition keeps one colour and one dash in every picture; both differ between conditions, so none rests on colour.
"""

import html
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from deepdelta.lab.analysis.results import ConditionResult, CurvePoint, RewriteSummary, StudyResults
from deepdelta.lab.views.drawing import (
    BASELINE_COLOUR,
    COLOURS,
    DASHES,
    Figure,
    before_and_after,
    gate_map,
    layout,
    line,
    shares,
)


@dataclass(frozen=True, kw_only=True)
class Look:
    colour: str
    dash: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One way to say how far a run is: `position(condition, point)` on an axis of this title."""

    key: str
    title: str
    position: Callable[[ConditionResult, CurvePoint], float]


def looks(results: StudyResults) -> dict[str, Look]:
    """Colour and dash of every condition; the baseline is grey and solid."""
    # The two cycles have lengths without a common factor: 40 conditions before a pair repeats.
    cycle = zip(itertools.cycle(COLOURS), itertools.cycle(DASHES), strict=False)
    return {
        condition.name: Look(colour=BASELINE_COLOUR, dash="solid")
        if condition.name == results.baseline
        else Look(colour=(look := next(cycle))[0], dash=look[1])
        for condition in results.conditions
    }


def axes(results: StudyResults) -> tuple[Axis, ...]:
    tokens = results.budget.tokens_per_step
    return (
        Axis(key="steps", title="optimiser steps", position=lambda condition, point: float(point.step)),
        Axis(
            key="flops",
            title="training FLOPs",
            position=lambda condition, point: point.step * tokens * condition.flops_per_token,
        ),
        Axis(key="seconds", title="seconds of training", position=lambda condition, point: point.seconds),
    )


def differences(results: StudyResults) -> Figure | None:
    """Seed-paired differences to the baseline: a dot per seed, the mean, its interval, what could be resolved."""
    comparisons = {one.condition: one.comparison for one in results.against_baseline()}
    if not comparisons:
        return None
    baseline = results.condition(results.baseline).losses()
    traces: list[Figure] = []
    shapes: list[Figure] = [line(x0=0, x1=0, y0=0, y1=1, yref="paper", width=1.5)]
    titles: list[Figure] = []
    for row, (name, comparison) in enumerate(comparisons.items()):
        colour = looks(results)[name].colour
        losses = results.condition(name).losses()
        seeds = [seed for seed in results.seeds if seed in losses and seed in baseline]
        reach = comparison.smallest_resolvable
        if reach is not None:
            shapes.append(
                {
                    "type": "rect",
                    "layer": "below",
                    "x0": -reach,
                    "x1": reach,
                    "y0": row - 0.2,
                    "y1": row + 0.2,
                    "line": {"width": 0},
                    "fillcolor": "rgba(128,136,148,0.2)",
                }
            )
        interval = comparison.t_interval
        if interval is not None:
            shapes.append(line(x0=interval.low, x1=interval.high, y0=row, y1=row, colour=colour, width=2.5))
        common: Figure = {"type": "scatter", "mode": "markers", "name": html.escape(name)}
        traces += [
            common
            | {
                "x": [losses[seed] - baseline[seed] for seed in seeds],
                "y": [row] * len(seeds),
                "text": [f"seed {seed}" for seed in seeds],
                "hovertemplate": "%{text}: %{x:+.4f} nats<extra></extra>",
                "marker": {"size": 10, "symbol": "circle-open", "color": colour, "line": {"width": 2}},
            },
            common
            | {
                "x": [comparison.mean],
                "y": [row],
                "hovertemplate": "mean: %{x:+.4f} nats<extra></extra>",
                "marker": {"size": 13, "symbol": "diamond", "color": colour},
            },
        ]
        titles.append(
            {
                "text": f"<b>{html.escape(name)}</b>",
                "xref": "paper",
                "x": 0,
                "xanchor": "left",
                "y": row - 0.38,
                "showarrow": False,
            }
        )
    frame = layout(
        height=90 + 62 * len(comparisons),
        x={"title": {"text": "loss minus the baseline's (nats per token)"}, "zeroline": False},
        y={"range": [len(comparisons) - 0.6, -0.65], "visible": False, "fixedrange": True},
    )
    return {"data": traces, "layout": frame | {"shapes": shapes, "annotations": titles, "hovermode": "closest"}}


def measured_loss(results: StudyResults) -> str | None:
    """Which loss the curves show: validation where any run has it, else training; None without curves."""
    points = [point for condition in results.conditions for run in condition.runs for point in run.curve]
    for kind in ("validation", "train"):
        if any(getattr(point, f"{kind}_loss") is not None for point in points):
            return kind
    return None


def loss_curves(results: StudyResults, axis: Axis) -> Figure | None:
    """Loss against `axis`: a thin line per seed, and the mean over seeds where all of a condition have a point.

    The vertical range is that of the second half of the budget: the start would flatten it.
    """
    kind = measured_loss(results)
    if kind is None:
        return None
    traces: list[Figure] = []
    late: list[float] = []
    for number, condition in enumerate(results.conditions):
        look = looks(results)[condition.name]
        # `meta` ties a line to the condition's button in the page.
        common: Figure = {"type": "scatter", "mode": "lines", "name": html.escape(condition.name), "meta": number}
        curves = []
        for run in condition.runs:
            curve = {p.step: p for p in run.curve if getattr(p, f"{kind}_loss") is not None}
            losses = [getattr(point, f"{kind}_loss") for point in curve.values()]
            late += [loss for step, loss in zip(curve, losses, strict=True) if step >= 0.5 * results.budget.steps]
            if run.validation_loss is not None:
                curves.append(curve)
            traces.append(
                common
                | {
                    "x": [axis.position(condition, point) for point in curve.values()],
                    "y": losses,
                    "opacity": 0.35,
                    "hoverinfo": "skip",
                    "line": {"width": 1, "color": look.colour},
                }
            )
        steps = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
        means = [sum(getattr(curve[step], f"{kind}_loss") for curve in curves) / len(curves) for step in steps]
        traces.append(
            common
            | {
                "x": [sum(axis.position(condition, curve[step]) for curve in curves) / len(curves) for step in steps],
                "y": means,
                "mode": "lines+markers" if len(steps) <= 12 else "lines",
                "marker": {"size": 7, "color": look.colour},
                "line": {"width": 2.5, "color": look.colour, "dash": look.dash},
                "hovertemplate": f"%{{y:.4f}} {html.escape(condition.name)}<extra></extra>",
            }
        )
    y: Figure = {"title": {"text": "validation loss (nats)" if kind == "validation" else "training loss (nats)"}}
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.1
        y["range"] = [min(late) - margin, max(late) + margin]
    frame = layout(height=360, x={"title": {"text": axis.title}, "rangemode": "tozero"}, y=y)
    return {"data": traces, "layout": frame | {"hovermode": "closest"}}


def highest_share(results: StudyResults) -> float:
    """The largest fraction of a sublayer's gates in one bin, over the study: the top of the heat maps' scale."""
    highest = [
        max(shares(rewrite.gate_histogram))
        for condition in results.conditions
        for rewrite in condition.rewrites
        if rewrite.gate_histogram is not None
    ]
    return max(highest, default=0.0)


def gate_heatmap(results: StudyResults, condition: ConditionResult) -> Figure | None:
    """Where a condition's gates lie in [0, 2], one row per sublayer from the first layer at the top."""
    rewrites = [rewrite for rewrite in condition.rewrites if rewrite.gate_histogram is not None]
    if not rewrites:
        return None
    return gate_map(
        [_row_name(rewrite) for rewrite in rewrites],
        [rewrite.gate_histogram or () for rewrite in rewrites],
        [rewrite.gate_mean for rewrite in rewrites],
        condition.rule,
        top=highest_share(results),
    )


def discrepancies(results: StudyResults, condition: ConditionResult) -> Figure | None:
    """The discrepancy of every sublayer before (ring) and after (disc) its rewrite, joined by a line."""
    points = [
        (_row_name(rewrite), rewrite.discrepancy_before, rewrite.discrepancy_after)
        for rewrite in condition.rewrites
        if rewrite.discrepancy_before is not None and rewrite.discrepancy_after is not None
    ]
    if not points:
        return None
    return before_and_after(points, looks(results)[condition.name].colour)


def _row_name(rewrite: RewriteSummary) -> str:
    return html.escape(f"{rewrite.layer} {rewrite.sublayer}")

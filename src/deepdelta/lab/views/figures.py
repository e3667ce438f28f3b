"""The pictures of a study.

A condition keeps one colour and one dash in every picture; both differ between conditions, so none rests on colour.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

from deepdelta.lab.analysis.results import ConditionResult, CurvePoint, RewriteSummary, RunResult, StudyResults
from deepdelta.lab.views.drawing import (
    BASELINE_COLOUR,
    COLOURS,
    DASHES,
    MARK,
    before_and_after,
    dots,
    figure,
    gate_map,
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


def differences(results: StudyResults) -> Any | None:
    """Seed-paired differences to the baseline: a dot per seed, the mean, its interval, what could be resolved."""
    contrasts = results.against_baseline()
    if not contrasts:
        return None
    made = figure(90 + 62 * len(contrasts), "loss minus the baseline's (nats per token)")
    made.update_xaxes(zeroline=False)
    made.update_yaxes(range=[len(contrasts) - 0.6, -0.65], visible=False, fixedrange=True)
    made.add_vline(0, line={"color": MARK, "width": 1.5})
    for row, one in enumerate(contrasts):
        colour, name, found = looks(results)[one.condition].colour, escape(one.condition), one.comparison
        reach, interval = found.smallest_resolvable, found.t_interval
        if reach is not None:
            band = {"y0": row - 0.2, "y1": row + 0.2, "line_width": 0, "fillcolor": "rgba(128,136,148,0.2)"}
            made.add_shape(type="rect", layer="below", x0=-reach, x1=reach, **band)
        if interval is not None:
            style = {"color": colour, "width": 2.5}
            made.add_shape(type="line", x0=interval.low, x1=interval.high, y0=row, y1=row, line=style)
        rings, seeds = list(one.differences.values()), [f"seed {seed}" for seed in one.differences]
        says = "%{text}: %{x:+.4f} nats"
        dots(made, rings, [row] * len(rings), says, colour, "circle-open", name=name, text=seeds)
        dots(made, [found.mean], [row], "mean: %{x:+.4f} nats", colour, "diamond", 13, name=name)
        place = {"xref": "paper", "x": 0, "xanchor": "left", "y": row - 0.38}
        made.add_annotation(text=f"<b>{name}</b>", showarrow=False, **place)
    return made


def measured_loss(results: StudyResults) -> str | None:
    """Which loss the curves show: validation where any run has it, else training; None without curves."""
    points = [point for condition in results.conditions for run in condition.runs for point in run.curve]
    for kind in ("validation", "train"):
        if any(getattr(point, f"{kind}_loss") is not None for point in points):
            return kind
    return None


def loss_curves(results: StudyResults, axis: Axis) -> Any | None:
    """Loss against `axis`: a thin line per seed, and the mean over seeds where all of a condition have a point.

    The vertical range is that of the second half of the budget: the start would flatten it.
    """
    kind = measured_loss(results)
    if kind is None:
        return None
    made = figure(360, axis.title)
    made.update_xaxes(rangemode="tozero")
    made.update_yaxes(title_text="validation loss (nats)" if kind == "validation" else "training loss (nats)")
    late: list[float] = []
    for number, condition in enumerate(results.conditions):
        look, name = looks(results)[condition.name], escape(condition.name)
        # `meta` ties a line to the condition's button in the page.
        common = {"name": name, "meta": number}
        for run in condition.runs:
            curve = _curve(condition, run, axis, kind)
            late += [loss for step, (_, loss) in curve.items() if step >= 0.5 * results.budget.steps]
            made.add_scatter(
                x=[x for x, _ in curve.values()],
                y=[loss for _, loss in curve.values()],
                mode="lines",
                opacity=0.35,
                hoverinfo="skip",
                line={"width": 1, "color": look.colour},
                **common,
            )
        mean = mean_curve(condition, axis, kind)
        made.add_scatter(
            x=[x for x, _ in mean.values()],
            y=[loss for _, loss in mean.values()],
            mode="lines+markers" if len(mean) <= 12 else "lines",
            marker={"size": 7, "color": look.colour},
            line={"width": 2.5, "color": look.colour, "dash": look.dash},
            hovertemplate=f"%{{y:.4f}} {name}<extra></extra>",
            **common,
        )
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.1
        made.update_yaxes(range=[min(late) - margin, max(late) + margin])
    return made


def mean_curve(condition: ConditionResult, axis: Axis, kind: str) -> dict[int, tuple[float, float]]:
    """By step, place on the axis and loss, means over the finished runs where all of them have a point."""
    curves = [_curve(condition, run, axis, kind) for run in condition.runs if run.validation_loss is not None]
    shared = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
    return {step: (fmean(own[step][0] for own in curves), fmean(own[step][1] for own in curves)) for step in shared}


def _curve(condition: ConditionResult, run: RunResult, axis: Axis, kind: str) -> dict[int, tuple[float, float]]:
    return {
        point.step: (axis.position(condition, point), loss)
        for point in run.curve
        if (loss := getattr(point, f"{kind}_loss")) is not None
    }


def highest_share(results: StudyResults) -> float:
    """The largest fraction of a sublayer's gates in one bin, over the study: the top of the heat maps' scale."""
    gates = [one.gate_histogram for condition in results.conditions for one in condition.rewrites]
    return max((max(shares(histogram)) for histogram in gates if histogram is not None), default=0.0)


def gate_heatmap(results: StudyResults, condition: ConditionResult) -> Any | None:
    """Where a condition's gates lie in [0, 2], one row per sublayer from the first layer at the top."""
    gates = [(_row_name(one), one.gate_histogram, one.gate_mean) for one in condition.rewrites if one.gate_histogram]
    if not gates:
        return None
    rows, histograms, means = zip(*gates, strict=True)
    return gate_map(rows, histograms, means, condition.rule, top=highest_share(results))


def discrepancies(results: StudyResults, condition: ConditionResult) -> Any | None:
    """The discrepancy of every sublayer before (ring) and after (disc) its rewrite, joined by a line."""
    points = [
        (_row_name(one), one.discrepancy_before, one.discrepancy_after)
        for one in condition.rewrites
        if one.discrepancy_before is not None and one.discrepancy_after is not None
    ]
    return before_and_after(points, looks(results)[condition.name].colour) if points else None


def _row_name(rewrite: RewriteSummary) -> str:
    return escape(f"{rewrite.layer} {rewrite.sublayer}")

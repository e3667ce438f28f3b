"""The pictures of a study.

A condition keeps one colour and one dash in every picture; both differ between conditions, so none rests on colour.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from html import escape, unescape
from statistics import fmean
from textwrap import wrap
from typing import Any

from deepdelta.lab.analysis.results import (
    ConditionResult,
    Contrast,
    CurvePoint,
    RewriteSummary,
    RunResult,
    StudyResults,
)
from deepdelta.lab.views.drawing import (
    BASELINE_COLOUR,
    COLOURS,
    DASHES,
    MARK,
    before_and_after,
    dots,
    figure,
    gate_map,
    row_figure,
    shares,
)

FEWEST = 5
"""Validations that make a curve."""


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
    """Those that the results have numbers for: bytes where they were counted for every condition."""
    tokens = results.budget.tokens_per_step
    moved = {one.name: one.cost.moved_bytes for one in results.conditions if one.cost and one.cost.moved_bytes}
    traffic = Axis(
        key="bytes",
        title="bytes moved in training",
        position=lambda condition, point: point.step * tokens * moved[condition.name],
    )
    return (
        Axis(key="steps", title="optimiser steps", position=lambda condition, point: float(point.step)),
        Axis(
            key="flops",
            title="training FLOPs",
            position=lambda condition, point: point.step * tokens * condition.flops_per_token,
        ),
        Axis(key="seconds", title="seconds of training", position=lambda condition, point: point.seconds),
        *([traffic] if len(moved) == len(results.conditions) else []),
    )


def differences(results: StudyResults) -> Any | None:
    """A forest of seed-paired differences at the first budget: to the baseline, then of conditions to their controls.

    A dot per seed, the mean, its interval, and for the baseline what could be resolved.
    """
    against = results.against_baseline()
    if not against:
        return None
    controls = [one for one in results.contrasts if one.budget == results.budgets[0] and one not in against]
    contrasts = (*against, *controls)
    rows = [_difference_name(results, one) for one in contrasts]
    made = figure(90 + 62 * len(contrasts), "difference of the loss (nats per token)")
    made.update_xaxes(zeroline=False)
    made.update_yaxes(
        type="category",
        categoryarray=rows,
        categoryorder="array",
        range=[len(rows) - 0.6, -0.65],
        visible=False,
        fixedrange=True,
    )
    made.update_layout(meta={"rows": "comparison"})
    made.add_vline(0, line={"color": MARK, "width": 1.5})
    for row, (name, one) in enumerate(zip(rows, contrasts, strict=True)):
        colour, found = looks(results)[one.condition].colour, one.comparison
        reach, interval = found.smallest_resolvable, found.t_interval
        if reach is not None and one in against:
            band = {"y0": row - 0.2, "y1": row + 0.2, "line_width": 0, "fillcolor": "rgba(128,136,148,0.2)"}
            made.add_shape(type="rect", layer="below", x0=-reach, x1=reach, **band)
        bar: dict[str, Any] = {}
        if interval is not None:
            sizes = {"array": [interval.high - found.mean], "arrayminus": [found.mean - interval.low]}
            bar = {
                "error_x": {"type": "data", "symmetric": False, "color": colour, "thickness": 2.5, "width": 0} | sizes
            }
        rings, seeds = list(one.differences.values()), [f"seed {seed}" for seed in one.differences]
        says = "%{text}: %{x:+.4f} nats"
        dots(made, rings, [name] * len(rings), says, colour, "circle-open", name="seeds", text=seeds)
        dots(
            made, [found.mean], [name], "mean: %{x:+.4f} nats", colour, "diamond", 13, name="mean", text=["mean"], **bar
        )
        place = {"xref": "paper", "x": 0, "xanchor": "left", "y": row - 0.22, "yanchor": "bottom", "align": "left"}
        made.add_annotation(text=f"<b>{_in_lines(name)}</b>", showarrow=False, **place)
    return made


def _difference_name(results: StudyResults, one: Contrast) -> str:
    return escape(one.condition if one.reference == results.baseline else f"{one.condition} − {one.reference}")


def _in_lines(name: str) -> str:
    """An escaped name in lines that a narrow page has room for."""
    return "<br>".join(map(escape, wrap(unescape(name), 42, break_on_hyphens=False)))


def measured_loss(results: StudyResults) -> str | None:
    """Which loss the curves show: validation where a run has it FEWEST times, else training; None without curves."""
    curves = [run.curve for condition in results.conditions for run in condition.runs]
    for kind, fewest in (("validation", FEWEST), ("train", 1), ("validation", 1)):
        if any(sum(getattr(point, f"{kind}_loss") is not None for point in curve) >= fewest for curve in curves):
            return kind
    return None


def loss_curves(results: StudyResults) -> Any | None:
    """Loss over training: a thin line per seed, and the mean over seeds where all of a condition have a point.

    It lies against the first of the axes; places on the others stand in the lines' `meta`, for the page to switch to.
    The vertical range is that of the second half of the budget: the start would flatten it.
    """
    kind = measured_loss(results)
    if kind is None:
        return None
    first = axes(results)[0]
    made = figure(400, first.title)
    made.update_xaxes(rangemode="tozero")
    made.update_yaxes(title_text="validation loss (nats)" if kind == "validation" else "training loss (nats)")
    made.update_layout(meta={"axes": [(axis.key, axis.title) for axis in axes(results)]})
    late: list[float] = []
    for number, condition in enumerate(results.conditions):
        look, name = looks(results)[condition.name], escape(condition.name)
        for run in condition.runs:
            curves = {axis.key: _curve(condition, run, axis, kind) for axis in axes(results)}
            late += [loss for step, (_, loss) in curves[first.key].items() if step >= 0.5 * results.budget.steps]
            made.add_scatter(
                **_laid_out(curves, number, str(run.seed)),
                mode="lines",
                name=name,
                opacity=0.35 if kind == "validation" else 0.15,  # a batch's loss jumps
                hoverinfo="skip",
                line={"width": 1, "color": look.colour},
            )
        means = {axis.key: mean_curve(condition, axis, kind) for axis in axes(results)}
        made.add_scatter(
            **_laid_out(means, number, "mean"),
            mode="lines+markers" if len(means[first.key]) <= 12 else "lines",
            name=name,
            marker={"size": 7, "color": look.colour},
            line={"width": 2.5, "color": look.colour, "dash": look.dash},
            hovertemplate=f"%{{y:.4f}} {name}<extra></extra>",
        )
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.1
        made.update_yaxes(range=[min(late) - margin, max(late) + margin])
    return made


def _short(value: float) -> float:
    """To six digits: curves are most of a page."""
    return float(f"{value:.6g}")


def _laid_out(curves: dict[str, dict[int, tuple[float, float]]], number: int, seed: str) -> dict[str, Any]:
    """A curve on the first of the axes, and in `meta` its places on the others, its seed and condition."""
    (first, on), *others = ((key, [_short(x) for x, _ in curve.values()]) for key, curve in curves.items())
    losses = [_short(loss) for _, loss in curves[first].values()]
    return {"x": on, "y": losses, "meta": {"condition": number, "seed": seed, "x": dict(others)}}


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


def over_depth(results: StudyResults, field: str, title: str) -> Any | None:
    """A number of every sublayer's rewrite, a line per condition; the first sublayer at the top."""
    rows = list(dict.fromkeys(_row_name(one) for condition in results.conditions for one in condition.rewrites))
    made = row_figure(rows, title)
    made.update_xaxes(rangemode="tozero")
    for number, condition in enumerate(results.conditions):
        there = [(getattr(one, field), _row_name(one)) for one in condition.rewrites]
        points = [(value, row) for value, row in there if value is not None]
        if points:
            look, name = looks(results)[condition.name], escape(condition.name)
            made.add_scatter(
                mode="lines+markers",
                x=[value for value, _ in points],
                y=[row for _, row in points],
                name=name,
                meta={"condition": number},
                hovertemplate=f"%{{y}}: %{{x:.3g}} {name}<extra></extra>",
                line={"color": look.colour, "width": 2, "dash": look.dash},
                marker_size=7,
            )
    return made if made.data else None


def _row_name(rewrite: RewriteSummary) -> str:
    return escape(f"{rewrite.layer} {rewrite.sublayer}")

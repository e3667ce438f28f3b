"""The pictures of a study as plotly.js figures (plain data: traces and layout).

Colours of text, grids and backgrounds are left to the page's style sheet, so that light and dark follow the reader.
A condition keeps one colour and one dash in every picture; both differ between conditions, so none rests on colour.
"""

import html
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepdelta.studies.results import GATE_BINS, ConditionResult, CurvePoint, RewriteSummary, StudyResults
from deepdelta.studies.statistics import compare

Figure = dict[str, Any]
Number = float | int

BASELINE_COLOUR = "#7a8490"
# All have a contrast of at least 3 to 1 on the page's light and on its dark background (WCAG 2.2, 1.4.11).
COLOURS = ("#3b82d6", "#d2691e", "#26966a", "#cf4a92", "#8a63d2", "#8f8420", "#1593a8", "#d64545")
DASHES = ("solid", "6px,2px", "2px,2px", "9px,3px,2px,3px", "12px,3px")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'  # the page's: plotly.js measures text with it
MARK = "rgba(128,136,148,0.55)"
ERASING = ("keep", "erase", "reflect")
REGIMES = {"delta": ("skip", "overwrite", "reflect"), "erase_only": ERASING, "additive_erase": ERASING}
"""What a gate of exactly 0, 1 and 2 does under a rule that erases; a gate of `write_only` just scales the write."""


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
    comparisons = compare(results)
    if not comparisons:
        return None
    baseline = results.condition(results.baseline).losses()
    traces: list[Figure] = []
    shapes: list[Figure] = [_line(x0=0, x1=0, y0=0, y1=1, yref="paper", width=1.5)]
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
            shapes.append(_line(x0=interval.low, x1=interval.high, y0=row, y1=row, colour=colour, width=2.5))
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
    layout = _layout(
        height=90 + 62 * len(comparisons),
        x={"title": {"text": "loss minus the baseline's (nats per token)"}, "zeroline": False},
        y={"range": [len(comparisons) - 0.6, -0.65], "visible": False, "fixedrange": True},
    )
    return {"data": traces, "layout": layout | {"shapes": shapes, "annotations": titles, "hovermode": "closest"}}


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
    layout = _layout(height=360, x={"title": {"text": axis.title}, "rangemode": "tozero"}, y=y)
    return {"data": traces, "layout": layout | {"hovermode": "closest"}}


def highest_share(results: StudyResults) -> float:
    """The largest fraction of a sublayer's gates in one bin, over the study: the top of the heat maps' scale."""
    shares = [
        max(_shares(rewrite.gate_histogram))
        for condition in results.conditions
        for rewrite in condition.rewrites
        if rewrite.gate_histogram is not None
    ]
    return max(shares, default=0.0)


def gate_heatmap(results: StudyResults, condition: ConditionResult) -> Figure | None:
    """Where a condition's gates lie in [0, 2], one row per sublayer from the first layer at the top."""
    rewrites = [rewrite for rewrite in condition.rewrites if rewrite.gate_histogram is not None]
    if not rewrites:
        return None
    rows = [_row_name(rewrite) for rewrite in rewrites]
    width = 2 / GATE_BINS
    heat: Figure = {
        "type": "heatmap",
        "x0": width / 2,
        "dx": width,
        "y": rows,
        "z": [_shares(rewrite.gate_histogram or ()) for rewrite in rewrites],
        "zmin": 0,
        "zmax": highest_share(results) or 1,
        "colorscale": [[0, "rgba(59,130,214,0)"], [1, "rgba(59,130,214,1)"]],
        "showscale": False,
        "ygap": 2,
        "hovertemplate": "%{y}: %{z:.1%} of gates at %{x:.2f} ± 0.05<extra></extra>",
    }
    means: Figure = {
        "type": "scatter",
        "mode": "markers",
        "x": [rewrite.gate_mean for rewrite in rewrites],
        "y": rows,
        "hovertemplate": "%{y}: mean gate %{x:.3f}<extra></extra>",
        "marker": {"symbol": "line-ns", "size": 11, "line": {"width": 2.5, "color": "#d2691e"}},
    }
    layout = _layout(
        height=104 + 22 * len(rows),
        x={
            "title": {"text": "gate β"},
            "range": [-0.04, 2.04],
            "tickvals": [0, 0.5, 1, 1.5, 2],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        y=_row_axis(rows) | {"showgrid": False},
    )
    words = REGIMES.get(condition.rule, ("", "", ""))
    regimes = list(zip((0, 1, 2), words, ("left", "center", "right"), strict=True))
    return {
        "data": [heat, means],
        "layout": layout
        | {
            "margin": layout["margin"] | {"t": 26},
            "hovermode": "closest",
            "shapes": [_line(x0=x, x1=x, y0=0, y1=1, yref="paper", dash="3px,3px") for x, _, _ in regimes],
            "annotations": [
                {"text": f"{x} {word}".strip(), "x": x, "xanchor": anchor, "y": 1, "yref": "paper", "yanchor": "bottom"}
                | {"showarrow": False, "font": {"size": 11}}
                for x, word, anchor in regimes
            ],
        },
    }


def discrepancies(results: StudyResults, condition: ConditionResult) -> Figure | None:
    """The discrepancy of every sublayer before (ring) and after (disc) its rewrite, joined by a line."""
    points = [
        (_row_name(rewrite), rewrite.discrepancy_before, rewrite.discrepancy_after)
        for rewrite in condition.rewrites
        if rewrite.discrepancy_before is not None and rewrite.discrepancy_after is not None
    ]
    if not points:
        return None
    rows = [row for row, _, _ in points]
    colour = looks(results)[condition.name].colour
    common: Figure = {"type": "scatter", "mode": "markers", "y": rows}
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for _, before, after in points for x in (before, after, None)],
                "y": [y for row in rows for y in (row, row, None)],
                "line": {"width": 3, "color": colour},
                "opacity": 0.45,
                "hoverinfo": "skip",
            },
            common
            | {
                "x": [before for _, before, _ in points],
                "hovertemplate": "%{y}: %{x:.3g} before<extra></extra>",
                "marker": {"size": 10, "symbol": "circle-open", "color": colour, "line": {"width": 2}},
            },
            common
            | {
                "x": [after for _, _, after in points],
                "hovertemplate": "%{y}: %{x:.3g} after<extra></extra>",
                "marker": {"size": 10, "color": colour},
            },
        ],
        "layout": _layout(
            height=84 + 22 * len(rows),
            x={"title": {"text": "rms of kᵀX − v"}, "rangemode": "tozero", "zeroline": False},
            y=_row_axis(rows),
        )
        | {"hovermode": "closest"},
    }


def _shares(counts: tuple[int, ...]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def _row_name(rewrite: RewriteSummary) -> str:
    return html.escape(f"{rewrite.layer} {rewrite.sublayer}")


def _row_axis(rows: list[str]) -> Figure:
    return {"type": "category", "range": [len(rows) - 0.5, -0.5], "fixedrange": True, "nticks": len(rows)}


def _line(
    *,
    x0: Number,
    x1: Number,
    y0: Number,
    y1: Number,
    yref: str = "y",
    colour: str = MARK,
    width: Number = 1,
    dash: str = "solid",
) -> Figure:
    line = {"color": colour, "width": width, "dash": dash}
    return {"type": "line", "x0": x0, "x1": x1, "y0": y0, "y1": y1, "yref": yref, "line": line}


def _layout(*, height: int, x: Figure, y: Figure) -> Figure:
    return {
        "height": height,
        "autosize": True,
        "showlegend": False,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "font": {"family": FONT, "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": {"automargin": True, "exponentformat": "SI", "title": {"standoff": 10}} | x,
        "yaxis": {"automargin": True} | y,
    }

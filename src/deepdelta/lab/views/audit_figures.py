"""The pictures of an audit: rows are sublayers, the first at the top."""

import html
import math
from collections.abc import Sequence
from dataclasses import asdict

from deepdelta.lab.audit.findings import Effect, Findings, GateAudit
from deepdelta.lab.views.drawing import (
    BASELINE_COLOUR,
    COLOURS,
    MARK,
    Figure,
    before_and_after,
    gate_map,
    layout,
    line,
    row_axis,
    shares,
)

REGIME_COLOURS = dict(
    zip(
        ("skip", "under_relaxed", "project", "over_relaxed", "reflect", "unstable"),
        (BASELINE_COLOUR, COLOURS[6], COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[7]),
        strict=True,
    )
)


def row_name(residual: str) -> str:
    """'0 attention' for 'layers.0.attention'."""
    return residual.removeprefix("layers.").replace(".", " ")


def rows_of(findings: Findings) -> list[str]:
    """The names of the sublayers, fit for plotly.js, which reads tags in texts."""
    return [html.escape(row_name(residual.name)) for residual in findings.residuals]


def highest_share(findings: Findings) -> float:
    """The largest fraction of a sublayer's gates in one bin: the top of the maps' scale."""
    gates = [gate for one in findings.residuals for gate in (one.gate, one.erase_gate) if gate is not None]
    return max((max(shares(gate.histogram)) for gate in gates), default=0.0)


def gate_distribution(findings: Findings, gates: Sequence[GateAudit | None], rule: str) -> Figure | None:
    """Where one gate of every sublayer lies in [0, 2]; None for a rule without it."""
    there = [gate for gate in gates if gate is not None]
    if not there:
        return None
    histograms, means = [gate.histogram for gate in there], [gate.values.mean for gate in there]
    return gate_map(rows_of(findings), histograms, means, rule, top=highest_share(findings))


def regimes(findings: Findings) -> Figure | None:
    """The fraction of rewrites in each regime, as stacked bars; of the erase where there are two gates."""
    there = [one.erase_gate or one.gate for one in findings.residuals]
    if None in there:
        return None
    rows = rows_of(findings)
    fractions = [asdict(gate.regimes) for gate in there if gate is not None]
    bars: list[Figure] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name.replace("_", "-"),
            "y": rows,
            "x": [fraction[name] for fraction in fractions],
            "marker": {"color": colour},
            "hovertemplate": f"%{{y}}: %{{x:.1%}} {name.replace('_', '-')}<extra></extra>",
        }
        for name, colour in REGIME_COLOURS.items()
    ]
    frame = layout(
        height=130 + 22 * len(rows),
        x={"range": [0, 1], "tickformat": ".0%", "fixedrange": True, "title": {"text": "share of rewrites"}},
        y=row_axis(rows),
    )
    return {"data": bars, "layout": frame | {"barmode": "stack", "bargap": 0.25} | _legend(frame)}


def discrepancies(findings: Findings) -> Figure | None:
    """Root mean square of k^T X - v before and after every rewrite; None for a rule without a target."""
    points = [
        (row, one.discrepancy.rms_before, one.discrepancy.rms_after)
        for row, one in zip(rows_of(findings), findings.residuals, strict=True)
        if one.discrepancy is not None
    ]
    return before_and_after(points, COLOURS[0]) if points else None


def cosines(findings: Findings) -> Figure:
    """The distribution of cos(k, X): box for the middle half, whiskers from 5 to 95 %, a dashed line at the mean."""
    rows, found = rows_of(findings), [one.cosine for one in findings.residuals]
    box: Figure = {
        "type": "box",
        "orientation": "h",
        "y": rows,
        "q1": [one.q25 for one in found],
        "median": [one.median for one in found],
        "q3": [one.q75 for one in found],
        "lowerfence": [one.q05 for one in found],
        "upperfence": [one.q95 for one in found],
        "mean": [one.mean for one in found],
        "boxmean": True,
        "boxpoints": False,
        "marker": {"color": COLOURS[0]},
        "line": {"width": 1.5},
    }
    frame = layout(height=84 + 22 * len(rows), x={"title": {"text": "cos(k, X)"}, "zeroline": False}, y=row_axis(rows))
    return {"data": [box], "layout": frame | {"shapes": [line(x0=0, x1=0, y0=0, y1=1, yref="paper")]}}


def state_shares(findings: Findings) -> Figure:
    """How much of the state every sublayer erases, writes and changes in all."""
    rows, marks = rows_of(findings), (("erased", "circle-open", 1), ("written", "circle", 0), ("changed", "diamond", 2))
    traces: list[Figure] = []
    for name, symbol, colour in marks:
        values = [getattr(one, name) for one in findings.residuals]
        if all(value is None for value in values):
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": values,
                "y": rows,
                "hovertemplate": f"%{{y}}: %{{x:.3g}} {name}<extra></extra>",
                "marker": {"size": 10, "symbol": symbol, "color": COLOURS[colour], "line": {"width": 2}},
            }
        )
    frame = layout(
        height=130 + 22 * len(rows),
        x={"title": {"text": "relative to the size of the state"}, "rangemode": "tozero", "zeroline": False},
        y=row_axis(rows),
    )
    return {"data": traces, "layout": frame | {"hovermode": "closest"} | _legend(frame)}


def eigenvalues(findings: Findings) -> Figure | None:
    """The eigenvalues of the composed shortcut other than the trivial ones, in the complex plane."""
    if findings.shortcut is None:
        return None
    points = findings.shortcut.eigenvalues
    cloud: Figure = {
        "type": "scatter",
        "mode": "markers",
        "x": [real for real, _ in points],
        "y": [imaginary for _, imaginary in points],
        "hovertemplate": "%{x:.3f} %{y:+.3f} i<extra></extra>",
        "marker": {"size": 5, "opacity": 0.45, "color": COLOURS[0]},
    }
    reach = 1.05 * max(1.0, *(math.hypot(*point) for point in points))
    axis: Figure = {"range": [-reach, reach]}
    frame = layout(
        height=460,
        x=axis | {"title": {"text": "real part"}, "constrain": "domain"},
        y=axis | {"title": {"text": "imaginary part"}, "scaleanchor": "x"},
    )
    circle = {"type": "circle", "x0": -1, "x1": 1, "y0": -1, "y1": 1, "layer": "below", "line": {"color": MARK}}
    return {"data": [cloud], "layout": frame | {"hovermode": "closest", "shapes": [circle]}}


def over_depth(findings: Findings, field: str, title: str) -> Figure | None:
    """A number of the shortcut up to every sublayer."""
    if findings.shortcut is None:
        return None
    rows, depth = rows_of(findings), findings.shortcut.depth
    trace: Figure = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [getattr(one, field) for one in depth],
        "y": rows,
        "hovertemplate": "%{y}: %{x:.3g}<extra></extra>",
        "line": {"color": COLOURS[0], "width": 2},
        "marker": {"size": 8},
    }
    frame = layout(
        height=84 + 22 * len(rows),
        x={"title": {"text": title}, "rangemode": "tozero", "zeroline": False},
        y=row_axis(rows),
    )
    return {"data": [trace], "layout": frame | {"hovermode": "closest"}}


def loss_changes(findings: Findings, label: str) -> Figure | None:
    """The change of the loss under one intervention, sublayer by sublayer, with its interval; None without a number."""
    effects = [_of(one.effects, label) for one in findings.residuals]
    there = [
        (row, effect.loss_change, effect.low, effect.high)
        for row, effect in zip(rows_of(findings), effects, strict=True)
        if effect.loss_change is not None
    ]
    if not there:
        return None
    trace: Figure = {
        "type": "scatter",
        "mode": "markers",
        "x": [change for _, change, _, _ in there],
        "y": [row for row, _, _, _ in there],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [0.0 if high is None else high - change for _, change, _, high in there],
            "arrayminus": [0.0 if low is None else change - low for _, change, low, _ in there],
            "color": COLOURS[0],
        },
        "hovertemplate": "%{y}: %{x:+.4f} nats<extra></extra>",
        "marker": {"size": 9, "symbol": "diamond", "color": COLOURS[0]},
    }
    rows = rows_of(findings)
    frame = layout(
        height=84 + 22 * len(rows),
        x={"title": {"text": "change of the loss (nats per token)"}, "zeroline": False},
        y=row_axis(rows) | {"categoryorder": "array", "categoryarray": rows},
    )
    zero = line(x0=0, x1=0, y0=0, y1=1, yref="paper", width=1.5)
    return {"data": [trace], "layout": frame | {"hovermode": "closest", "shapes": [zero]}}


def _of(effects: Sequence[Effect], label: str) -> Effect:
    return next(effect for effect in effects if effect.intervention == label)


def _legend(frame: Figure) -> Figure:
    """A legend above the picture."""
    return {
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "margin": frame["margin"] | {"t": 40},
    }

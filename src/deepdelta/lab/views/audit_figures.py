"""The pictures of an audit: rows are sublayers, the first at the top."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from deepdelta.lab.audit.findings import Findings, GateAudit
from deepdelta.lab.views.drawing import (
    BASELINE_COLOUR,
    COLOURS,
    MARK,
    before_and_after,
    dots,
    figure,
    gate_map,
    legend_above,
    row_figure,
    shares,
)

REGIME_COLOURS = {
    "skip": BASELINE_COLOUR,
    "under_relaxed": COLOURS[6],
    "project": COLOURS[0],
    "over_relaxed": COLOURS[1],
    "reflect": COLOURS[3],
    "unstable": COLOURS[7],
}


def row_name(residual: str) -> str:
    """'0 attention' for 'layers.0.attention'."""
    return residual.removeprefix("layers.").replace(".", " ")


def rows_of(findings: Findings) -> list[str]:
    """The names of the sublayers, escaped."""
    return [escape(row_name(residual.name)) for residual in findings.residuals]


def gate_distribution(findings: Findings, gates: Sequence[GateAudit | None], rule: str) -> Any | None:
    """Where one gate of every sublayer lies in [0, 2]; None for a rule without it."""
    there = [gate for gate in gates if gate is not None]
    if not there:
        return None
    every = [gate for one in findings.residuals for gate in (one.gate, one.erase_gate) if gate is not None]
    top = max(max(shares(gate.histogram)) for gate in every)
    histograms, means = [gate.histogram for gate in there], [gate.values.mean for gate in there]
    return gate_map(rows_of(findings), histograms, means, rule, top=top)


def regimes(findings: Findings) -> Any | None:
    """The fraction of rewrites in each regime, as stacked bars; of the erase where there are two gates."""
    there = [one.erase_gate or one.gate for one in findings.residuals]
    fractions = [asdict(gate.regimes) for gate in there if gate is not None]
    if len(fractions) < len(there):
        return None
    made = row_figure(rows := rows_of(findings), "share of rewrites", more=130)
    for name, colour in REGIME_COLOURS.items():
        shown = name.replace("_", "-")
        made.add_bar(
            orientation="h",
            name=shown,
            y=rows,
            x=[fraction[name] for fraction in fractions],
            marker_color=colour,
            hovertemplate=f"%{{y}}: %{{x:.1%}} {shown}<extra></extra>",
        )
    made.update_xaxes(range=[0, 1], tickformat=".0%", fixedrange=True)
    made.update_layout(barmode="stack", bargap=0.25)
    legend_above(made)
    return made


def discrepancies(findings: Findings) -> Any | None:
    """Root mean square of k^T X - v before and after every rewrite; None for a rule without a target."""
    points = [
        (row, one.discrepancy.rms_before, one.discrepancy.rms_after)
        for row, one in zip(rows_of(findings), findings.residuals, strict=True)
        if one.discrepancy is not None
    ]
    return before_and_after(points, COLOURS[0]) if points else None


def cosines(findings: Findings) -> Any:
    """The distribution of cos(k, X): box for the middle half, whiskers from 5 to 95 %, a dashed line at the mean."""
    found = [one.cosine for one in findings.residuals]
    names = {"q1": "q25", "median": "median", "q3": "q75", "lowerfence": "q05", "upperfence": "q95", "mean": "mean"}
    made = row_figure(rows := rows_of(findings), "cos(k, X)")
    made.add_box(
        orientation="h",
        y=rows,
        **{key: [getattr(one, name) for one in found] for key, name in names.items()},
        boxmean=True,
        boxpoints=False,
        marker_color=COLOURS[0],
        line_width=1.5,
    )
    made.add_vline(0, line={"color": MARK, "width": 1})
    return made


def state_shares(findings: Findings) -> Any:
    """How much of the state every sublayer erases, writes and changes in all."""
    made = row_figure(rows := rows_of(findings), "relative to the size of the state", more=130)
    made.update_xaxes(rangemode="tozero")
    for name, symbol, colour in (("erased", "circle-open", 1), ("written", "circle", 0), ("changed", "diamond", 2)):
        values = [getattr(one, name) for one in findings.residuals]
        if any(value is not None for value in values):
            dots(made, values, rows, f"%{{y}}: %{{x:.3g}} {name}", COLOURS[colour], symbol, name=name)
    legend_above(made)
    return made


def eigenvalues(findings: Findings) -> Any | None:
    """The eigenvalues of the composed shortcut other than the trivial ones, in the complex plane."""
    if findings.shortcut is None:
        return None
    points = findings.shortcut.eigenvalues
    reach = 1.05 * max(1.0, *(math.hypot(*point) for point in points))
    made = figure(460, "real part")
    made.add_scatter(
        mode="markers",
        x=[real for real, _ in points],
        y=[imaginary for _, imaginary in points],
        hovertemplate="%{x:.3f} %{y:+.3f} i<extra></extra>",
        marker={"size": 5, "opacity": 0.45, "color": COLOURS[0]},
    )
    made.add_shape(type="circle", x0=-1, x1=1, y0=-1, y1=1, layer="below", line_color=MARK)
    made.update_xaxes(range=[-reach, reach], constrain="domain")
    made.update_yaxes(range=[-reach, reach], title_text="imaginary part", scaleanchor="x")
    return made


def over_depth(findings: Findings, field: str, title: str) -> Any | None:
    """A number of the shortcut up to every sublayer."""
    if findings.shortcut is None:
        return None
    made = row_figure(rows := [escape(row_name(one.residual)) for one in findings.shortcut.depth], title)
    made.update_xaxes(rangemode="tozero")
    made.add_scatter(
        mode="lines+markers",
        x=[getattr(one, field) for one in findings.shortcut.depth],
        y=rows,
        hovertemplate="%{y}: %{x:.3g}<extra></extra>",
        line={"color": COLOURS[0], "width": 2},
        marker_size=8,
    )
    return made


def loss_changes(findings: Findings, label: str) -> Any | None:
    """The change of the loss under one intervention, sublayer by sublayer, with its interval; None without a number."""
    rows = rows_of(findings)
    there = {
        row: effect.change
        for row, one in zip(rows, findings.residuals, strict=True)
        for effect in one.effects
        if effect.intervention == label and effect.change is not None
    }
    if not there:
        return None
    sizes = [0.0 if one.t_interval is None else one.t_interval.high - one.mean for one in there.values()]
    reach = {"type": "data", "array": sizes, "color": COLOURS[0]}
    made = row_figure(rows, "change of the loss (nats per token)")
    changes = [one.mean for one in there.values()]
    dots(made, changes, list(there), "%{y}: %{x:+.4f} nats", COLOURS[0], "diamond", 9, error_x=reach)
    made.add_vline(0, line={"color": MARK, "width": 1.5})
    return made

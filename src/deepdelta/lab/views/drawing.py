"""What the pictures of a page are made of: plotly.js figures as plain data, traces and layout.

Colours of text, grids and backgrounds are left to the page's style sheet, so that light and dark follow the reader.
"""

from collections.abc import Sequence
from typing import Any

from deepdelta.lab.measure.rewrites import GATE_BINS

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


def gate_map(
    rows: Sequence[str],
    histograms: Sequence[Sequence[int]],
    means: Sequence[float | None],
    rule: str,
    *,
    top: float,
) -> Figure:
    """Where gates lie in [0, 2]: one row of shares per sublayer from the first at the top, and its mean.

    Args:
        top: the share that has the full colour.
    """
    width = 2 / GATE_BINS
    heat: Figure = {
        "type": "heatmap",
        "x0": width / 2,
        "dx": width,
        "y": rows,
        "z": [shares(histogram) for histogram in histograms],
        "zmin": 0,
        "zmax": top or 1,
        "colorscale": [[0, "rgba(59,130,214,0)"], [1, "rgba(59,130,214,1)"]],
        "showscale": False,
        "ygap": 2,
        "hovertemplate": "%{y}: %{z:.1%} of gates at %{x:.2f} ± 0.05<extra></extra>",
    }
    ticks: Figure = {
        "type": "scatter",
        "mode": "markers",
        "x": means,
        "y": rows,
        "hovertemplate": "%{y}: mean gate %{x:.3f}<extra></extra>",
        "marker": {"symbol": "line-ns", "size": 11, "line": {"width": 2.5, "color": "#d2691e"}},
    }
    frame = layout(
        height=104 + 22 * len(rows),
        x={
            "title": {"text": "gate β"},
            "range": [-0.04, 2.04],
            "tickvals": [0, 0.5, 1, 1.5, 2],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        y=row_axis(rows) | {"showgrid": False},
    )
    words = REGIMES.get(rule, ("", "", ""))
    regimes = list(zip((0, 1, 2), words, ("left", "center", "right"), strict=True))
    return {
        "data": [heat, ticks],
        "layout": frame
        | {
            "margin": frame["margin"] | {"t": 26},
            "hovermode": "closest",
            "shapes": [line(x0=x, x1=x, y0=0, y1=1, yref="paper", dash="3px,3px") for x, _, _ in regimes],
            "annotations": [
                {"text": f"{x} {word}".strip(), "x": x, "xanchor": anchor, "y": 1, "yref": "paper", "yanchor": "bottom"}
                | {"showarrow": False, "font": {"size": 11}}
                for x, word, anchor in regimes
            ],
        },
    }


def before_and_after(points: Sequence[tuple[str, float, float]], colour: str) -> Figure:
    """The discrepancy of every row before (ring) and after (disc) its rewrite, joined by a line."""
    rows = [row for row, _, _ in points]
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
        "layout": layout(
            height=84 + 22 * len(rows),
            x={"title": {"text": "rms of kᵀX − v"}, "rangemode": "tozero", "zeroline": False},
            y=row_axis(rows),
        )
        | {"hovermode": "closest"},
    }


def shares(counts: Sequence[int]) -> list[float]:
    """Each count over their sum."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def row_axis(rows: Sequence[str]) -> Figure:
    """An axis of names, the first at the top."""
    return {"type": "category", "range": [len(rows) - 0.5, -0.5], "fixedrange": True, "nticks": len(rows)}


def line(
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
    """A line behind the data."""
    style = {"color": colour, "width": width, "dash": dash}
    return {"type": "line", "x0": x0, "x1": x1, "y0": y0, "y1": y1, "yref": yref, "line": style}


def layout(*, height: int, x: Figure, y: Figure) -> Figure:
    """The frame of a picture, without a legend."""
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

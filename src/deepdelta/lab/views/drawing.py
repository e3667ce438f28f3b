"""What the pictures of a page are made of: figures of plotly, each row of which is a sublayer or a condition.

Colours of text, grids and backgrounds are left to the page's style sheet, so that light and dark follow the reader.
plotly reads tags in texts, so names come here escaped.
"""

from collections.abc import Sequence
from html import unescape
from typing import Any

from deepdelta.errors import without_extra
from deepdelta.lab.measure.rewrites import GATE_BINS

BASELINE_COLOUR = "#7a8490"
# All have a contrast of at least 3 to 1 on the page's light and on its dark background (WCAG 2.2, 1.4.11).
COLOURS = ("#3b82d6", "#d2691e", "#26966a", "#cf4a92", "#8a63d2", "#8f8420", "#1593a8", "#d64545")
DASHES = ("solid", "6px,2px", "2px,2px", "9px,3px,2px,3px", "12px,3px")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'  # the page's: plotly.js measures text with it
MARK, CLEAR = "rgba(128,136,148,0.55)", "rgba(0,0,0,0)"
ERASING = ("keep", "erase", "reflect")
REGIMES = {
    "delta": ("skip", "overwrite", "reflect"),
    **dict.fromkeys(("erase_only", "additive_erase", "channels"), ERASING),
}
"""What a gate of exactly 0, 1 and 2 does under a rule that erases; a gate of `write_only` just scales the write."""


def figure(height: int, x: str) -> Any:
    """An empty picture of so many pixels, its horizontal axis named.

    Raises:
        UserError: the extra `lab` (plotly) is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ModuleNotFoundError as error:
        raise without_extra("pages", "lab", error) from None
    made = go.Figure()
    made.update_layout(
        template=None,
        height=height,
        showlegend=False,
        hovermode="closest",
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        font={"family": FONT, "size": 12},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        xaxis={"automargin": True, "exponentformat": "SI", "title": {"text": x, "standoff": 10}},
        yaxis={"automargin": True},
    )
    return made


def row_figure(rows: Sequence[str], x: str, more: int = 84) -> Any:
    """An empty picture with a row per name, the first at the top; `more` pixels for what is not rows."""
    made = figure(more + 22 * len(rows), x)
    made.update_xaxes(zeroline=False)
    made.update_yaxes(
        type="category",
        range=[len(rows) - 0.5, -0.5],
        fixedrange=True,
        nticks=len(rows),
        categoryorder="array",
        categoryarray=list(rows),
    )
    made.update_layout(meta={"rows": "sublayer"})
    return made


def dots(
    made: Any,
    x: Sequence[float | None],
    rows: Sequence[Any],
    says: str,
    colour: str,
    symbol: str = "circle",
    size: int = 10,
    **more: Any,
) -> None:
    """A mark per row, where the pointer reads what `says` makes of it."""
    made.add_scatter(
        x=x,
        y=rows,
        mode="markers",
        hovertemplate=f"{says}<extra></extra>",
        marker={"symbol": symbol, "size": size, "color": colour, "line_width": 2 * symbol.endswith("open")},
        **more,
    )


def legend_above(made: Any) -> None:
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        margin_t=40,
    )


def gate_map(
    rows: Sequence[str], histograms: Sequence[Sequence[int]], means: Sequence[float | None], rule: str, *, top: float
) -> Any:
    """Where gates lie in [0, 2]: one row of shares per sublayer from the first at the top, and its mean.

    Args:
        top: the share that has the full colour.
    """
    width = 2 / GATE_BINS
    made = row_figure(rows, "gate β", more=104)
    made.add_heatmap(
        x0=width / 2,
        dx=width,
        y=rows,
        z=[shares(histogram) for histogram in histograms],
        name="share of gates",
        zmin=0,
        zmax=top or 1,
        colorscale=[[0, "rgba(59,130,214,0)"], [1, "rgba(59,130,214,1)"]],
        showscale=False,
        ygap=2,
        hovertemplate="%{y}: %{z:.1%} of gates at %{x:.2f} ± 0.05<extra></extra>",
    )
    dots(made, means, rows, "%{y}: mean gate %{x:.3f}", COLOURS[1], "line-ns", 11, name="mean gate")
    made.data[-1].marker.line = {"width": 2.5, "color": COLOURS[1]}
    made.update_xaxes(range=[-0.04, 2.04], tickvals=[0, 0.5, 1, 1.5, 2], showgrid=False)
    made.update_yaxes(showgrid=False)
    made.update_layout(margin_t=26)
    for x, word, anchor in zip((0, 1, 2), REGIMES.get(rule, ("", "", "")), ("left", "center", "right"), strict=True):
        made.add_vline(x, line={"color": MARK, "width": 1, "dash": "3px,3px"})
        made.add_annotation(
            text=f"{x} {word}".strip(),
            x=x,
            xanchor=anchor,
            y=1,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
            font_size=11,
        )
    return made


def before_and_after(points: Sequence[tuple[str, float, float]], colour: str) -> Any:
    """The discrepancy of every row before (ring) and after (disc) its rewrite, joined by a line."""
    rows = [row for row, _, _ in points]
    made = row_figure(rows, "rms of kᵀX − v")
    made.update_xaxes(rangemode="tozero")
    made.add_scatter(
        mode="lines",
        x=[x for _, before, after in points for x in (before, after, None)],
        y=[y for row in rows for y in (row, row, None)],
        line={"width": 3, "color": colour},
        opacity=0.45,
        hoverinfo="skip",
        meta={"ornament": True},
    )
    _, before, after = zip(*points, strict=True)
    for name, values, symbol in (("before", before, "circle-open"), ("after", after, "circle")):
        dots(made, values, rows, f"%{{y}}: %{{x:.3g}} {name}", colour, symbol, name=name)
    return made


def told(made: Any) -> str:
    """What a picture shows, for those who do not see it: of every line its ends, of every mark over rows its range."""
    rows = made.layout.yaxis.type == "category"
    said = []
    for trace in made.data:
        if trace.type == "heatmap" or trace.hoverinfo == "skip":
            continue
        values, places = (trace.median if trace.type == "box" else trace.x, trace.y) if rows else (trace.y, trace.x)
        points = [(value, place) for value, place in zip(values, places, strict=True) if value is not None]
        if not points:
            continue
        if rows:
            (low, there), (high, here) = min(points), max(points)
            text = f"{low:.4g} ({there})" if low == high else f"{low:.4g} ({there}) to {high:.4g} ({here})"
        elif trace.mode == "markers":
            text = f"{len(points)} points"
        else:
            (start, there), (end, here) = points[0], points[-1]
            text = f"{start:.4g} at {there:.3g}, {end:.4g} at {here:.3g}"
        said.append(f"{trace.name} {text}" if trace.name else text)
    return unescape(f"{made.layout.xaxis.title.text}. {'; '.join(said)}.")


def shares(counts: Sequence[int]) -> list[float]:
    """Each count over their sum."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]

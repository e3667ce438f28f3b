"""Pictures as SVG by matplotlib: no display, no script, nothing loaded, the same bytes for the same numbers."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from deepdelta.errors import printable, without_extra

WIDTH, LINE = 9.0, 0.19
"""Of a picture and, in height, of a line of text, in inches."""
INK, FAINT, GRID = "#1c2128", "#59636e", "#d8dde3"
STYLE: dict[Any, Any] = {
    # Letters stay letters: what a picture says can be searched, and its file is small.
    "svg.fonttype": "none",
    "svg.hashsalt": "deepdelta",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": INK,
    "lines.scale_dashes": False,
    "legend.frameon": False,
}


def drawn(title: str, subtitle: str, heights: Sequence[float], draw: Callable[..., None]) -> Any:
    """The matplotlib figure that `draw` fills: its title, then a subfigure of every height, in inches.

    Args:
        draw: takes the subfigures.

    Raises:
        UserError: the extra `lab` (matplotlib) is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise without_extra("pictures", "lab", error) from None
    bold, faint = textwrap.wrap(printable(title), 100), textwrap.wrap(printable(subtitle), 125)
    head = LINE * len(bold + faint) + 0.1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, head + sum(heights)), layout="constrained")
        top, *others = figure.subfigures(1 + len(heights), 1, height_ratios=(head, *heights), squeeze=False)[:, 0]
        for number, line in enumerate(bold + faint):
            style: dict[str, Any] = {"weight": "bold"} if number < len(bold) else {"color": FAINT, "size": 8}
            top.text(0.012, 1 - LINE * (number + 0.9) / head, line, **style)
        draw(*others)
    return figure


def svg(figure: Any) -> str:
    """The figure as text."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    # A hundredth of a point is enough.
    return re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), file.getvalue())


def label(name: str) -> str:
    """The name for a legend, which leaves out those that begin with an underscore."""
    return printable(f"\u200b{name}" if name.startswith("_") else name)


def legend(figure: Any, axes: Any) -> None:
    """The names of an axes' curves, under the figure, in as many columns as have room."""
    handles, labels = axes.get_legend_handles_labels()
    columns = legend_columns(labels)
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=8, handlelength=3)


def legend_columns(labels: Sequence[str]) -> int:
    return max(1, min(4, 120 // (max(map(len, labels)) + 10)))


def named_rows(axes: Any, names: list[str], texts: list[str]) -> None:
    """Names at the left of rows, the first at the top, and what each row says at the right."""
    rows = range(len(names))
    axes.set_yticks(rows, list(map(printable, names)))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    right = axes.secondary_yaxis("right")
    right.set_yticks(rows, texts)
    for one in (axes, right):
        one.tick_params(axis="y", length=0)
        one.spines[:].set_visible(False)
    right.tick_params(axis="y", labelcolor=FAINT)

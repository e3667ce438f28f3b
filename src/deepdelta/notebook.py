"""What a notebook shows of an object: a small table and a picture as HTML in the reader's colours, every text escaped.

No script, no style sheet, nothing loaded; `_repr_html_` of DeltaOperator, DeltaStream, runs and results return it.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

from deepdelta.errors import printable

BLUE, GREY = "#3b82d6", "#7a8490"
FONT = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'


def shown(*parts: str) -> str:
    """The parts beside each other."""
    style = "display: flex; flex-wrap: wrap; gap: 24px; align-items: flex-start"
    return f'<div style="{style}">{"".join(parts)}</div>'


def table(title: str, rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A row per sequence; its first cell names it."""
    titles = "".join(f'<th scope="col" style="text-align: left">{text(one)}</th>' for one in head)
    body = "".join(
        f'<tr><th scope="row" style="text-align: left">{text(first)}</th>'
        + "".join(f'<td style="text-align: left">{text(cell)}</td>' for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    caption = f'<caption style="text-align: left; font-weight: 600">{text(title)}</caption>'
    return f"<table>{caption}{f'<thead><tr>{titles}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def text(value: object) -> str:
    return escape(printable(str(value)))


def spectrum(points: Sequence[complex | float]) -> str:
    """Eigenvalues in the complex plane with the unit circle."""
    reach = 1.1 * max(1.0, *(abs(one) for one in points)) if points else 1.1
    scale = 100 / reach
    dots = "".join(f'<circle cx="{one.real * scale:.1f}" cy="{-one.imag * scale:.1f}" r="3.5"/>' for one in points)
    axes = f'<path d="M-100 0H100M0 -100V100" stroke="{GREY}" stroke-width=".6"/>'
    circle = f'<circle r="{scale:.1f}" fill="none" stroke="{GREY}" stroke-dasharray="4 4"/>'
    says = f"{len(points)} eigenvalues in the complex plane, and the unit circle"
    return _svg("-104 -104 208 208", 220, says, f'{axes}{circle}<g fill="{BLUE}" fill-opacity=".75">{dots}</g>')


def curve(points: Sequence[tuple[float, float]], says: str) -> str:
    """Values over steps; nothing without two points of finite value."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        return ""
    (left, *_, right), values = [x for x, _ in points], [y for _, y in points]
    low, high = min(values), max(values)
    places = (
        f"{44 + 250 * (x - left) / (right - left or 1):.1f} {8 + 110 * (high - y) / (high - low or 1):.1f}"
        for x, y in points
    )
    labels = (
        f'<text x="40" y="14" text-anchor="end">{high:.2f}</text>'
        f'<text x="40" y="120" text-anchor="end">{low:.2f}</text>'
        f'<text x="44" y="136">{left:.0f}</text><text x="294" y="136" text-anchor="end">{right:.0f}</text>'
    )
    line = f'<path d="M{"L".join(places)}" fill="none" stroke="{BLUE}" stroke-width="1.8"/>'
    axes = f'<path d="M44 8V118H294" fill="none" stroke="{GREY}" stroke-width=".8"/>'
    return _svg("0 0 300 142", 320, says, f"{axes}{line}<g {FONT}>{labels}</g>")


def intervals(rows: Sequence[tuple[float, float, float]], says: str) -> str:
    """Means with what they may be, from the first at the top; a line at 0."""
    low, high = min(0.0, *(one for _, one, _ in rows)), max(0.0, *(one for _, _, one in rows))
    height = 26 * len(rows)

    def at(value: float) -> float:
        return 12 + 256 * (value - low) / (high - low or 1)

    marks = "".join(
        f'<path d="M{at(left):.1f} {26 * i + 13}H{at(right):.1f}" stroke="{BLUE}" stroke-width="2.5"/>'
        f'<circle cx="{at(mean):.1f}" cy="{26 * i + 13}" r="4.5" fill="{BLUE}"/>'
        for i, (mean, left, right) in enumerate(rows)
    )
    zero = f'<path d="M{at(0.0):.1f} 0V{height}" stroke="{GREY}" stroke-dasharray="4 4"/>'
    label = f'<text {FONT} x="{at(0.0):.1f}" y="{height + 14}" text-anchor="middle">0</text>'
    return _svg(f"0 0 280 {height + 18}", 280, says, f"{zero}{marks}{label}")


def _svg(box: str, width: int, says: str, content: str) -> str:
    return f'<svg viewBox="{box}" width="{width}" role="img" aria-label="{text(says)}">{content}</svg>'

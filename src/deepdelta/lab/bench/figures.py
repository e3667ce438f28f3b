"""The picture of a benchmark as one SVG: bars with intervals per group, or curves where groups grow along an axis."""

import itertools
from dataclasses import dataclass
from typing import Any

from deepdelta.lab.bench import tables
from deepdelta.lab.bench.config import MEASURES
from deepdelta.lab.bench.results import BenchResults, GroupResult, Row
from deepdelta.lab.views.jinja import templates

WIDTH, LABEL, PLOT = 860, 250, 520
"""Of the picture, of the names at the left, and of what is drawn, in pixels."""
ROW, HEAD, HEIGHT = 22, 34, 200
"""Height of a bar's row, of a title, and of a panel of curves."""
COLOURS = ("#7a8490", "#3b82d6", "#d2691e", "#26966a", "#cf4a92", "#8a63d2")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A row of a panel: the bar to `value`, the interval, and what must be reached, in pixels from the left."""

    name: str
    text: str
    y: int
    value: float
    low: float | None
    high: float | None
    goal: float | None
    baseline: bool


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    y: int
    one: float
    """Where the ratio 1 is."""
    bottom: int
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    name: str
    colour: str
    points: tuple[tuple[float, float, str], ...]
    """x, y, and what the point says."""

    @property
    def path(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in self.points)


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    y: int
    ticks_x: tuple[tuple[float, str], ...]
    ticks_y: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


def svg(results: BenchResults) -> str:
    """The picture; it carries its own style and loads nothing."""
    panels: list[Panel] = []
    charts: list[Chart] = []
    y = 66
    for result in results.groups:
        if result.group.axis is None and (panel := _panel(result, y)) is not None:
            panels.append(panel)
            y = panel.bottom + HEAD
    for axis in dict.fromkeys(result.group.axis for result in results.groups if result.group.axis is not None):
        along = [result for result in results.groups if result.group.axis == axis and result.rows]
        for measure in ("forward_backward", "peak"):
            if chart := _chart(along, axis, measure, y + HEAD):
                charts.append(chart)
                y += HEIGHT + 3 * HEAD
    shown: dict[str, Any] = {"results": results, "panels": panels, "charts": charts, "facts": tables.facts(results)}
    sizes = {"width": WIDTH, "label": LABEL, "plot": PLOT, "row": ROW, "panel_height": HEIGHT, "height": y + 10}
    return _render("plot.svg", **shown, **sizes)


def page(results: BenchResults) -> str:
    """The picture and the tables as one self-contained page; its content security policy forbids loading anything."""
    from markupsafe import Markup

    return _render(
        "page.html",
        results=results,
        facts=tables.facts(results),
        tables=tables.bench_tables(results),
        picture=Markup(svg(results)),
    )


def _render(template: str, **values: Any) -> str:
    text: str = templates("deepdelta.lab.bench").get_template(template).render(**values)
    return text


def _panel(result: GroupResult, y: int) -> Panel | None:
    """The group's first measure, or its peak memory where it has none."""
    first = next(iter(MEASURES[result.group.work]), "peak")
    drawn = [(row, ratio) for row in result.rows if (ratio := _ratio(row, first)) is not None]
    if not drawn:
        return None
    goals = {one.bar.case: one.bar for one in result.bars if one.bar.measure == first}
    reach = max(1.05, *(ratio[2] or ratio[0] for _, ratio in drawn))
    scale = PLOT / reach
    marks = []
    for number, (row, (value, low, high)) in enumerate(drawn):
        bar = goals.get(row.case)
        # A goal against another case than the baseline has no place on this axis.
        goal = None if bar is None or bar.against != result.group.baseline else bar.at_least or bar.at_most
        marks.append(
            Mark(
                name=row.case,
                text=f"{value:.3f}",
                y=y + 14 + number * ROW,
                value=LABEL + value * scale,
                low=None if low is None else LABEL + low * scale,
                high=None if high is None else LABEL + high * scale,
                goal=None if goal is None else LABEL + goal * scale,
                baseline=row.case == result.group.baseline,
            )
        )
    what = "peak memory" if first == "peak" else f"throughput, {tables.TITLES[first]}"
    title = f"{result.group.name}: {what}, {result.group.baseline} = 1"
    return Panel(title=title, y=y, one=LABEL + scale, bottom=y + 14 + len(drawn) * ROW, marks=tuple(marks))


def _chart(along: list[GroupResult], axis: str, measure: str, y: int) -> Chart | None:
    """The ratio of every case against the axis, in equal steps from one group to the next."""
    points = {
        (row.case, number): ratio[0]
        for number, result in enumerate(along)
        for row in result.rows
        if (ratio := _ratio(row, measure)) is not None
    }
    if not points:
        return None
    top = 1.1 * max(1.0, *points.values())

    def x(number: int) -> float:
        return LABEL + PLOT * (number + 0.5) / len(along)

    def height(value: float) -> float:
        return y + HEIGHT * (1 - value / top)

    lines = []
    names = dict.fromkeys(case for case, _ in points)
    for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
        own = [(number, value) for (case, number), value in points.items() if case == name]
        drawn = tuple((x(number), height(value), f"{name}: {value:.3f}") for number, value in own)
        lines.append(Line(name=name, colour=colour, points=drawn))
    step = next(size for size in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0, 1000.0) if top / size <= 8)
    return Chart(
        title=f"{'peak memory' if measure == 'peak' else 'throughput'} against {axis}, {along[0].group.baseline} = 1",
        y=y,
        ticks_x=tuple((x(number), f"{axis} {result.group.value}") for number, result in enumerate(along)),
        ticks_y=tuple((height(n * step), f"{n * step:g}") for n in range(int(top / step) + 1)),
        lines=tuple(lines),
    )


def _ratio(row: Row, measure: str) -> tuple[float, float | None, float | None] | None:
    if measure == "peak":
        return None if row.peak_ratio is None else (row.peak_ratio, None, None)
    if measure not in row.timings:
        return None
    ratio = row.timings[measure].ratio
    return ratio.median, ratio.low, ratio.high

"""The picture of a benchmark as one SVG: bars with intervals per group, or curves where groups grow along an axis."""

from typing import Any

from deepdelta.errors import printable
from deepdelta.lab.bench import tables
from deepdelta.lab.bench.config import MEASURES
from deepdelta.lab.bench.results import BenchResults, GroupResult, Row
from deepdelta.lab.views.page import render
from deepdelta.lab.views.svg import INK, LINE, drawn, label, legend, legend_columns, named_rows
from deepdelta.lab.views.svg import svg as as_svg

ROW, CURVES = 0.22, 2.3
"""Height of a bar's row and of a panel of curves, in inches."""
BASELINE, BAR, GOAL = "#7a8490", "#3b82d6", "#d2691e"
Shown = list[tuple[Row, tuple[float, float | None, float | None]]]
"""Rows with the median of their ratio and its interval."""


def svg(results: BenchResults) -> str:
    """The picture as text.

    Raises:
        UserError: matplotlib is not installed.
    """
    return as_svg(figure(results))


def figure(results: BenchResults) -> Any:
    """The picture as a figure of matplotlib."""
    panels = [(one, shown) for one in results.groups if one.group.axis is None and (shown := _shown(one, _first(one)))]
    charts = [
        (axis, measure, along)
        for axis in dict.fromkeys(one.group.axis for one in results.groups if one.group.axis is not None)
        for measure in ("forward_backward", "peak")
        if (along := [one for one in results.groups if one.group.axis == axis and _shown(one, measure)])
    ]
    names = [[row.case for one in along for row in one.rows] for *_, along in charts]
    heights = [ROW * len(shown) + 0.6 for _, shown in panels]
    heights += [CURVES + LINE * -(-len(set(own)) // legend_columns(own)) for own in names]

    def draw(*parts: Any) -> None:
        for part, (one, shown) in zip(parts, panels, strict=False):
            _bars(part.subplots(), one, shown)
        for part, (axis, measure, along) in zip(parts[len(panels) :], charts, strict=True):
            _curves(part, axis, measure, along)

    quick = "Quick run at reduced sizes, no measurement. " if results.quick else ""
    versions = f"{results.threads} threads, torch {results.versions['torch']}, {results.rounds} rounds"
    how = f"{quick}{results.machine['processor']}, {versions}; bar: median, whisker: 95 %, orange: to be reached"
    return drawn(results.question, how, heights, draw)


def page(results: BenchResults, picture: str) -> str:
    """The picture, as `svg` made it, and the tables as one self-contained page; its content security policy forbids
    loading anything."""
    from markupsafe import Markup

    return render(
        "bench.html",
        "",
        results=results,
        facts=tables.facts(results),
        tables=tables.bench_tables(results),
        # matplotlib's own SVG, in which it has escaped every text.
        picture=Markup(picture.partition("?>")[2].partition(">")[2]),  # nosec B704
    )


def _bars(here: Any, result: GroupResult, shown: Shown) -> None:
    """The group's first measure, or its peak memory where it has none."""
    first, baseline = _first(result), result.group.baseline
    goals = {one.bar.case: one.bar for one in result.bars if one.bar.measure == first}
    for number, (row, (value, low, high)) in enumerate(shown):
        here.barh(number, value, height=0.6, color=BASELINE if row.case == baseline else BAR)
        if low is not None and high is not None and row.case != baseline:
            here.errorbar(value, number, xerr=[[value - low], [high - value]], color=INK, capsize=3, linewidth=1.2)
        goal = goals.get(row.case)
        # A goal against another case than the baseline has no place on this axis.
        if goal is not None and goal.against == baseline:
            here.plot([goal.at_least or goal.at_most] * 2, [number - 0.4, number + 0.4], color=GOAL, linewidth=2.5)
    here.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    named_rows(here, [row.case for row, _ in shown], [f"{ratio[0]:.3f}" for _, ratio in shown])
    what = "peak memory" if first == "peak" else f"throughput, {tables.TITLES[first]}"
    here.set_title(printable(f"{result.group.name}: {what}, {baseline} = 1"))


def _curves(part: Any, axis: str, measure: str, along: list[GroupResult]) -> None:
    """The ratio of every case against the axis, in equal steps from one group to the next."""
    here = part.subplots()
    ratios = [{row.case: ratio[0] for row, ratio in _shown(one, measure)} for one in along]
    for name in dict.fromkeys(name for own in ratios for name in own):
        points = [(number, own[name]) for number, own in enumerate(ratios) if name in own]
        here.plot(*zip(*points, strict=True), marker="o", label=label(name))
    here.set_xticks(range(len(along)), [f"{axis} {one.group.value}" for one in along])
    here.margins(y=0.08)
    here.set_ylim(bottom=0)
    here.tick_params(length=0)
    what = "peak memory" if measure == "peak" else "throughput"
    here.set_title(printable(f"{what} against {axis}, {along[0].group.baseline} = 1"))
    legend(part, here)


def _first(result: GroupResult) -> str:
    return next(iter(MEASURES[result.group.work]), "peak")


def _shown(result: GroupResult, measure: str) -> Shown:
    """The rows that have the measure."""
    if measure == "peak":
        return [(row, (row.peak_ratio, None, None)) for row in result.rows if row.peak_ratio is not None]
    timed = [(row, row.timings[measure].ratio) for row in result.rows if measure in row.timings]
    return [(row, (ratio.median, ratio.low, ratio.high)) for row, ratio in timed]

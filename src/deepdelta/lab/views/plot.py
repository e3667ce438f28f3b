"""The picture of a study as one SVG: changes with their intervals, and loss against FLOPs and time."""

from typing import Any

from deepdelta.errors import printable
from deepdelta.lab.analysis.results import StudyResults
from deepdelta.lab.views.figures import Axis, axes, looks, mean_curve
from deepdelta.lab.views.svg import FAINT, LINE, drawn, label, legend, legend_columns, named_rows, svg
from deepdelta.lab.views.tables import si

ROW, CURVES = 0.24, 2.8
"""Height of a condition's row and of the curves, in inches."""
SHOWN = 0.15
"""Share of a run after which curves are drawn: the start would flatten the rest."""


def plot(results: StudyResults) -> str:
    """The picture as text.

    Raises:
        UserError: the extra `lab` is not installed.
    """
    return svg(study_figure(results))


def study_figure(results: StudyResults) -> Any:
    """The picture as a figure of matplotlib."""
    shown = [axis for axis in axes(results) if axis.key != "steps" and _mean_curves(results, axis)]
    names = [one.name for one in results.conditions]
    compared = results.against_baseline()
    heights = [ROW * len(compared) + 0.6] if compared else []
    if shown:
        heights.append(CURVES + LINE * -(-len(names) // legend_columns(names)))

    def draw(*parts: Any) -> None:
        if compared:
            _changes(parts[0].subplots(), results)
        if shown:
            here = parts[-1].subplots(1, len(shown), sharey=True, squeeze=False)[0]
            for axis, own in zip(shown, here, strict=True):
                _curves(own, results, axis)
            here[0].set_title("Training loss, nats per token, mean over seeds")
            legend(parts[-1], here[0])

    seeds = ", ".join(map(str, results.seeds))
    subtitle = f"{results.name}: seeds {seeds}; ring: a seed, diamond: the mean, bar: its 95 % t-interval"
    return drawn(results.description, subtitle, heights, draw)


def _changes(here: Any, results: StudyResults) -> None:
    texts = []
    for row, one in enumerate(results.against_baseline()):
        colour, found = looks(results)[one.condition].colour, one.comparison
        interval = found.t_interval
        texts.append(f"{found.mean:+.3f}" + (f" ({interval.low:+.3f} to {interval.high:+.3f})" if interval else ""))
        if interval:
            here.plot((interval.low, interval.high), (row, row), color=colour, linewidth=4, alpha=0.5)
        here.plot(list(one.differences.values()), [row] * found.n, "o", color=colour, markerfacecolor="none", ms=5)
        here.plot([found.mean], [row], "D", color=colour, ms=6)
    here.axvline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    named_rows(here, [one.condition for one in results.against_baseline()], texts)
    here.set_title(
        printable(f"Validation loss minus that of {results.baseline}, nats per token, at equal {results.budgets[0]}")
    )


def _curves(here: Any, results: StudyResults, axis: Axis) -> None:
    """Training loss, the mean over seeds where all finished ones have a point."""
    for name, points in _mean_curves(results, axis).items():
        look = looks(results)[name]
        dash = "solid" if look.dash == "solid" else (0, [float(x) for x in look.dash.replace("px", "").split(",")])
        here.plot(*zip(*points, strict=True), color=look.colour, linestyle=dash, linewidth=1.6, label=label(name))
    here.set_xlim(left=0)
    here.xaxis.set_major_formatter(lambda value, _: si(value) if value else "0")
    here.set_xlabel(axis.title)
    here.tick_params(length=0, labelcolor=FAINT)


def _mean_curves(results: StudyResults, axis: Axis) -> dict[str, list[tuple[float, float]]]:
    first = SHOWN * results.budget.steps
    means = {one.name: mean_curve(one, axis, "train") for one in results.conditions}
    shown = {name: [point for step, point in mean.items() if step >= first] for name, mean in means.items()}
    return {name: points for name, points in shown.items() if points}

"""The self-contained page of a study: one HTML file with its style, its data and plotly.js inside."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deepdelta.errors import without_extra
from deepdelta.files import AnyPath, write_text
from deepdelta.lab.analysis.results import ConditionResult, StudyResults
from deepdelta.lab.views import figures
from deepdelta.lab.views.drawing import Figure
from deepdelta.lab.views.jinja import templates
from deepdelta.lab.views.study import detail_tables, main_table
from deepdelta.lab.views.summary import summarise
from deepdelta.lab.views.tables import si


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture in the page: `title` names it, `key` is its element's id."""

    key: str
    title: str
    figure: Figure


def write_report(results: StudyResults, path: AnyPath) -> None:
    """Write the page atomically. It loads nothing: its content security policy forbids the browser to.

    Raises:
        UserError: the extra `study` (Jinja2, plotly, scipy) is not installed.
    """
    write_text(Path(path), render_page(results))


def render_page(results: StudyResults) -> str:
    """The page as text."""
    render = template("report.html")
    return render(
        results=results,
        summary=summarise(results),
        table=main_table(results),
        details=detail_tables(results),
        looks=figures.looks(results),
        difference=chart("difference", "Differences to the baseline", figures.differences(results)),
        curves=[
            drawn
            for axis in figures.axes(results)
            if (drawn := chart(axis.key, f"Loss against {axis.title}", figures.loss_curves(results, axis)))
        ],
        measured_loss=figures.measured_loss(results),
        gates=_per_condition(results, "gates", figures.gate_heatmap),
        highest_share=figures.highest_share(results),
        discrepancies=_per_condition(results, "discrepancy", figures.discrepancies),
    )


def template(name: str) -> Callable[..., str]:
    """What renders one of the room's templates, plotly.js at hand, from its values.

    Raises:
        UserError: the extra `study` (Jinja2, plotly) is not installed.
    """
    try:
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise without_extra("reports", "study", error) from None
    library = get_plotlyjs()
    assert "</script" not in library, "plotly.js would end the element that holds it"
    environment = templates("deepdelta.lab.views")
    environment.filters["si"] = si
    return partial(environment.get_template(name).render, plotly=Markup(library))


def chart(key: str, title: str, figure: Figure | None) -> Chart | None:
    """The picture with its place; None for none."""
    return None if figure is None else Chart(key=key, title=title, figure=figure)


def _per_condition(
    results: StudyResults, key: str, draw: Callable[[StudyResults, ConditionResult], Figure | None]
) -> list[Chart]:
    charts = (
        chart(f"{key}-{number}", condition.name, draw(results, condition))
        for number, condition in enumerate(results.conditions)
    )
    return [drawn for drawn in charts if drawn is not None]

"""Pages: one HTML file each, with its style and data; the script that draws stands beside it, or inside on request."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepdelta.errors import printable, without_extra
from deepdelta.explorer import operator_page
from deepdelta.files import AnyPath, write_text
from deepdelta.lab.analysis.results import ConditionResult, StudyResults
from deepdelta.lab.views import figures
from deepdelta.lab.views.drawing import told
from deepdelta.lab.views.study import detail_tables, main_table
from deepdelta.lab.views.summary import summarise
from deepdelta.lab.views.tables import si

SCRIPT = "plotly.min.js"
"""The file beside pages that draws their pictures."""
OPERATOR = "operator.html"
"""The page beside them on which the operator is moved by hand."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture in the page: `title` names it, `key` is its element's id, `figure` is one of plotly."""

    key: str
    title: str
    figure: Any

    @property
    def alternative(self) -> str:
        """What it shows, in words."""
        return f"{self.title}. {told(self.figure)}"


def write_report(
    results: StudyResults, path: AnyPath, *, self_contained: bool = False, so_far: str = "", reloads: bool = False
) -> None:
    """Write the page of a study atomically, and SCRIPT beside it unless the page is to be self-contained.

    A content security policy forbids the browser to load anything else.

    Args:
        so_far: of a study that has not ended, how far it is.
        reloads: whether the page loads itself anew again and again.

    Raises:
        UserError: the extra `lab` (Jinja2, plotly) is not installed.
    """
    text = render_page(results, self_contained=self_contained, so_far=so_far, reloads=reloads)
    write_page(Path(path), text, None if self_contained else SCRIPT)


def render_page(results: StudyResults, *, self_contained: bool = False, so_far: str = "", reloads: bool = False) -> str:
    """The page of a study as text; see `write_report`."""
    return render(
        "report.html",
        SCRIPT if not self_contained else None,
        results=results,
        so_far=so_far,
        reloads=reloads,
        summary=summarise(results),
        table=main_table(results),
        baseline=[one.name for one in results.conditions].index(results.baseline),
        details=detail_tables(results),
        looks=figures.looks(results),
        controls=any(condition.control for condition in results.conditions),
        difference=chart("difference", "Differences, seed by seed", figures.differences(results)),
        curves=chart("curves", "Loss during training", figures.loss_curves(results)),
        measured_loss=figures.measured_loss(results),
        gates=_per_condition(results, "gates", figures.gate_heatmap),
        highest_share=figures.highest_share(results),
        discrepancies=_per_condition(results, "discrepancy", figures.discrepancies),
        depth=[
            drawn
            for key, title in (("cosine", "mean |cos(k, X)|"), ("state_norm", "mean norm of a value channel of X"))
            if (drawn := chart(key, title[0].upper() + title[1:], figures.over_depth(results, key, title)))
        ],
    )


def render(template: str, script: str | None, **values: Any) -> str:
    """A template of this package as text: every value escaped and without control characters.

    Args:
        script: what stands beside the page and draws its pictures; None: the page holds it; "": it has none to draw.

    Raises:
        UserError: the extra `lab` (Jinja2, plotly) is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup, escape

        plotly = Markup(_plotly()) if script is None else ""  # nosec B704: the script that plotly ships
        operator = escape(operator_page()) if script is None else OPERATOR
    except ModuleNotFoundError as error:
        raise without_extra("pages", "lab", error) from None
    environment = Environment(
        loader=PackageLoader("deepdelta.lab.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Text alone: what is marked up already, and what is missing, are left for Jinja.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["si"] = si
    return environment.get_template(template).render(script=script, plotly=plotly, operator=operator, **values)


def write_page(path: Path, text: str, script: str | None) -> None:
    """Write the page atomically, and beside it what it needs: OPERATOR, and its script (see `render`) if that is not
    there yet; nothing beside a page that holds its script."""
    write_text(path, text)
    if script is not None:
        write_text(path.with_name(OPERATOR), operator_page())
    if script and not ((beside := path.with_name(script)).exists() and beside.read_text() == _plotly()):
        write_text(beside, _plotly())


def chart(key: str, title: str, figure: Any | None) -> Chart | None:
    """The picture with its place; None for none."""
    return None if figure is None else Chart(key=key, title=title, figure=figure)


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    library: str = get_plotlyjs()
    assert "</script" not in library, "plotly.js would end the element that holds it"
    return library


def _per_condition(
    results: StudyResults, key: str, draw: Callable[[StudyResults, ConditionResult], Any | None]
) -> list[Chart]:
    charts = (
        chart(f"{key}-{number}", condition.name, draw(results, condition))
        for number, condition in enumerate(results.conditions)
    )
    return [drawn for drawn in charts if drawn is not None]

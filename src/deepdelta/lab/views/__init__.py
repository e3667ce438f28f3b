"""The results of a study as terminal tables, as Markdown, and as one self-contained page."""

from deepdelta.lab.views.details import detail_tables, scaling_table, search_table
from deepdelta.lab.views.markdown import scaling_markdown, search_markdown, study_markdown
from deepdelta.lab.views.page import write_report
from deepdelta.lab.views.plot import plot
from deepdelta.lab.views.summary import Summary, summarise
from deepdelta.lab.views.table import markdown_table, render_table

__all__ = [
    "Summary",
    "detail_tables",
    "markdown_table",
    "plot",
    "render_table",
    "scaling_markdown",
    "scaling_table",
    "search_markdown",
    "search_table",
    "study_markdown",
    "summarise",
    "write_report",
]

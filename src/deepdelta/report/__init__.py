"""The results of a study as terminal tables, as Markdown, and as one self-contained page."""

from deepdelta.report.details import detail_tables, scaling_table, search_table
from deepdelta.report.markdown import scaling_markdown, search_markdown, study_markdown
from deepdelta.report.page import write_report
from deepdelta.report.plot import plot
from deepdelta.report.summary import Summary, summarise
from deepdelta.report.table import markdown_table, render_table

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

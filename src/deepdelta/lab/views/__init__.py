"""Stored results as terminal tables, as Markdown, as pictures and as pages."""

from deepdelta.lab.views.page import write_report
from deepdelta.lab.views.plot import plot
from deepdelta.lab.views.study import (
    detail_tables,
    render_study,
    scaling_markdown,
    scaling_table,
    search_markdown,
    search_table,
    study_markdown,
)
from deepdelta.lab.views.summary import Summary, summarise

__all__ = [
    "Summary",
    "detail_tables",
    "plot",
    "render_study",
    "scaling_markdown",
    "scaling_table",
    "search_markdown",
    "search_table",
    "study_markdown",
    "summarise",
    "write_report",
]

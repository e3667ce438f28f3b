"""The results of a study as a terminal table, as Markdown, and as one self-contained page."""

from deepdelta.report.page import write_report
from deepdelta.report.summary import Summary, summarise
from deepdelta.report.table import markdown_table, render_table

__all__ = ["Summary", "markdown_table", "render_table", "summarise", "write_report"]

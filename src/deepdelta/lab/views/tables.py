"""Tables as text: made once as cells, then shown in a terminal, in Markdown and in a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box, get_console
from rich.table import Table
from rich.text import Text

from deepdelta.errors import printable

ABSENT = "-"
FOLDED = 16  # characters of a column beside the first that a narrow terminal keeps in a line


@dataclass(frozen=True, kw_only=True)
class Column:
    title: str
    help: str = ""
    words: bool = False
    """Of words, which stand at the left as in the first column; figures stand at the right."""
    narrow: bool = True
    """Shown in a terminal too, not in Markdown alone."""
    spare: int = 0
    """Left out of a terminal that is too narrow, the highest number first; 0: never."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A table: column titles with what they mean, rows of text, and remarks.

    A line break within a title or a cell is where a narrow terminal breaks it; the other forms show a space there.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    title: str = ""


def render_cells(cells: Cells, bold: Sequence[int] = (), width: int | None = None) -> Table:
    """Any table for a terminal of so many columns (None: this one), some rows in bold type."""
    shown = _fitting(cells, width or get_console().width)
    table = Table(
        title=Text(printable(cells.title)),
        caption=Text(printable(" ".join(cells.notes))) if cells.notes else None,
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for number in shown:
        column = cells.columns[number]
        left = column.words or number == 0
        # Folded, not cut, where the terminal is too narrow: no digit may be lost. Names, in the first, stay whole.
        table.add_column(
            Text(printable(column.title)), justify="left" if left else "right", overflow="fold", no_wrap=number == 0
        )
    for number, row in enumerate(cells.rows):
        table.add_row(*(Text(printable(row[index])) for index in shown), style="bold" if number in bold else None)
    return table


def _fitting(cells: Cells, width: int) -> list[int]:
    """The columns that a terminal has room for; long words beside a row's name may be folded."""
    shown = [number for number, column in enumerate(cells.columns) if column.narrow]

    def needed(number: int) -> int:
        lines = (
            line
            for text in (cells.columns[number].title, *(row[number] for row in cells.rows))
            for line in text.split("\n")
        )
        longest = max(map(len, lines))
        return longest if number == 0 else min(longest, FOLDED)

    for number in sorted(shown, key=lambda number: -cells.columns[number].spare):
        if 1 + sum(needed(one) + 1 for one in shown) <= width or not cells.columns[number].spare:
            break
        shown.remove(number)
    return shown


def markdown_page(title: str, facts: Sequence[str], tables: Sequence[Cells]) -> str:
    """A whole page: what the figures depend on, a paragraph each, then the tables."""
    return "\n".join(
        [f"# {markdown_text(title)}\n", *(f"{markdown_text(line)}\n" for line in facts), *map(markdown_cells, tables)]
    )


def markdown_cells(cells: Cells) -> str:
    """Any table as GitHub-flavoured Markdown, under its title where it has one."""
    lines = [
        *((f"### {markdown_text(cells.title)}", "") if cells.title else ()),
        _markdown_row(tuple(column.title for column in cells.columns)),
        "| --- |" + "".join(" --- |" if column.words else " ---: |" for column in cells.columns[1:]),
        *map(_markdown_row, cells.rows),
    ]
    return "\n".join([*lines, "", *map(markdown_text, cells.notes)]) + "\n"


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown_text(text: str) -> str:
    # Backslashes before what Markdown would read as a mark, entities for what it would read as HTML.
    text = printable(text)
    for mark in "\\|*_`[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())

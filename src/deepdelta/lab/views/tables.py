"""Tables as text: made once, then shown in a terminal, in Markdown and in a page; and how they show comparisons."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box, get_console
from rich.table import Table
from rich.text import Text

from deepdelta.errors import printable
from deepdelta.lab.analysis.comparison import Comparison, Interval

ABSENT = "-"
FOLDED = 16  # characters of a column beside the first that a narrow terminal keeps in a line


@dataclass(frozen=True)
class Column:
    """A column: its title, what that means, and the text of its cell for a thing that has a row.

    Fields:
        words: of words, which stand at the left as in the first column; figures stand at the right.
        narrow: shown in a terminal too, not in Markdown alone.
        spare: left out of a terminal that is too narrow, the highest number first; 0: never.
    """

    title: str
    help: str = ""
    say: Callable[[Any], str] = str
    words: bool = field(default=False, kw_only=True)
    narrow: bool = field(default=True, kw_only=True)
    spare: int = field(default=0, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table: column titles with what they mean, rows of text, and remarks.

    A line break within a title or a cell is where a narrow terminal breaks it; the other forms show a space there.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    title: str = ""


def table_of(
    things: Iterable[Any], columns: Sequence[Column], *, title: str = "", notes: Iterable[str] = ()
) -> TextTable:
    """A row per thing."""
    rows = tuple(tuple(column.say(one) for column in columns) for one in things)
    return TextTable(title=title, columns=tuple(columns), rows=rows, notes=tuple(notes))


def comparison_columns(read: Callable[[Any], Comparison | None], unit: str = " nats") -> list[Column]:
    """Change, interval, p-value and finding, which every table of comparisons has, of what `read` finds in a thing."""

    def say(text: Callable[[Comparison], str | None]) -> Callable[[Any], str]:
        return lambda one: ABSENT if (found := read(one)) is None else text(found) or ABSENT

    def p(one: Comparison) -> str | None:
        return None if one.adjusted_p is None else f"{one.adjusted_p:.2g}"

    p_help = "Two-sided paired t-test, corrected for all comparisons of its kind at the same budget."
    return [
        Column("change", "Mean over seeds; negative means a lower value.", say(lambda one: f"{one.mean:+.4f}")),
        Column("95 %\ninterval", "Of the change: Student's t.", say(lambda one: interval_text(one.t_interval))),
        Column("p\n(Holm)", p_help, say(p), spare=6),
        Column("finding", "What interval and corrected test show.", say(lambda one: verdict(one, unit)), spare=9),
    ]


def interval_text(interval: Interval | None) -> str:
    return f"{interval.low:+.4f}\nto {interval.high:+.4f}" if interval else ABSENT


def verdict(comparison: Comparison, unit: str = " nats") -> str:
    """What the comparison shows, in plain English and no more than that.

    A difference is called lower or higher only if its 95 % t-interval excludes zero and Holm's correction, where one
    was made, leaves it below 5 %.
    """
    c = comparison
    if c.n == 1:
        return f"no interval from 1 seed (difference {c.mean:+.4f}{unit}): one seed shows no spread, so nothing follows"
    if c.sd == 0:
        return f"all {c.n} paired differences equal {c.mean:+.4f}{unit}: the seeds did not vary, so nothing follows"
    if c.t_interval is None:
        return (
            f"no interval from {c.n} seeds (mean difference {c.mean:+.4f}{unit}); "
            f"this design could have resolved {c.smallest_resolvable:.4f}{unit}"
        )
    low, high = c.t_interval.low, c.t_interval.high
    if low <= 0 <= high:
        return f"not separated; differences beyond [{low:+.4f}, {high:+.4f}]{unit} are excluded (95 %)"
    near, far = sorted((abs(low), abs(high)))
    side = "lower" if c.mean < 0 else "higher"
    claim = f"{side} by {abs(c.mean):.4f}{unit} (95 % interval {near:.4f} to {far:.4f})"
    if not c.separated:
        return f"{claim} taken alone, but not separated after Holm's correction (p = {c.adjusted_p:.2g})"
    return claim


def si(value: float | int) -> str:
    """Three significant digits with a metric prefix: 812345 is '812 k'."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {prefix}"
    return f"{value:.3g}"


def render(given: TextTable, bold: Sequence[int] = (), width: int | None = None) -> Table:
    """Any table for a terminal of so many columns (None: this one), some rows in bold type."""
    shown = _fitting(given, width or get_console().width)
    table = Table(
        title=Text(printable(given.title)),
        caption=Text(printable(" ".join(given.notes))) if given.notes else None,
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for number in shown:
        column = given.columns[number]
        left = column.words or number == 0
        # Folded, not cut, where the terminal is too narrow: no digit may be lost. Names, in the first, stay whole.
        table.add_column(
            Text(printable(column.title)), justify="left" if left else "right", overflow="fold", no_wrap=number == 0
        )
    for number, row in enumerate(given.rows):
        table.add_row(*(Text(printable(row[index])) for index in shown), style="bold" if number in bold else None)
    return table


def _fitting(table: TextTable, width: int) -> list[int]:
    """The columns that a terminal has room for; long words beside a row's name may be folded."""
    shown = [number for number, column in enumerate(table.columns) if column.narrow]

    def needed(number: int) -> int:
        lines = (
            line
            for text in (table.columns[number].title, *(row[number] for row in table.rows))
            for line in text.split("\n")
        )
        longest = max(map(len, lines))
        return longest if number == 0 else min(longest, FOLDED)

    for number in sorted(shown, key=lambda number: -table.columns[number].spare):
        if 1 + sum(needed(one) + 1 for one in shown) <= width or not table.columns[number].spare:
            break
        shown.remove(number)
    return shown


def markdown_page(title: str, facts: Sequence[str], tables: Sequence[TextTable]) -> str:
    """A whole page: what the figures depend on, a paragraph each, then the tables."""
    return "\n".join(
        [f"# {markdown_text(title)}\n", *(f"{markdown_text(line)}\n" for line in facts), *map(markdown_table, tables)]
    )


def markdown_table(table: TextTable) -> str:
    """Any table as GitHub-flavoured Markdown, under its title where it has one."""
    lines = [
        *((f"### {markdown_text(table.title)}", "") if table.title else ()),
        _markdown_row(tuple(column.title for column in table.columns)),
        "| --- |" + "".join(" --- |" if column.words else " ---: |" for column in table.columns[1:]),
        *map(_markdown_row, table.rows),
    ]
    return "\n".join([*lines, "", *map(markdown_text, table.notes)]) + "\n"


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown_text(text: str) -> str:
    """The text with nothing that Markdown would read as its own."""
    # Backslashes before what Markdown would read as a mark, entities for what it would read as HTML.
    text = printable(text)
    for mark in "\\|*_`[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())

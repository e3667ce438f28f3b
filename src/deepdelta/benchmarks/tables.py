"""The tables of a benchmark: made here once as text, then shown in the terminal, in Markdown and in the page."""

from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from deepdelta.benchmarks.config import Bar
from deepdelta.benchmarks.results import BenchResults, GroupResult, Ratio, Row

TITLES = {
    "forward_backward": "forward + backward",
    "step": "full step",
    "forward": "forward",
    "decoding": "decoding",
    "peak": "peak memory",
}
ABSENT = "-"
RATIO = "[95 %]"
WORDS = ("case", "work", "what", "precision", "plan")
"""Columns of words, which stand at the left."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Cells:
    title: str
    columns: tuple[str, ...]
    narrow: tuple[str, ...]
    """The columns that a terminal shows."""
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def cells(results: BenchResults) -> list[Cells]:
    """The bar, where the suite has one, and a table per group."""
    found = [_group(result) for result in results.groups]
    if any(result.bars for result in results.groups):
        found.insert(0, _bars(results))
    return found


def facts(results: BenchResults) -> str:
    """What the figures depend on, in a sentence."""
    how = f"{results.threads} threads, {results.device}, {results.precision}; {results.rounds} interleaved rounds"
    quick = "QUICK RUN at reduced sizes, no measurement. " if results.quick else ""
    return quick + results.facts(how, results.date)


def render(results: BenchResults) -> list[Table]:
    """The tables for a terminal; `table.md` has more columns."""
    return [terminal(one) for one in cells(results)]


def terminal(one: Cells) -> Table:
    table = Table(
        title=Text(one.title),
        caption=Text(" ".join(one.notes)) if one.notes else None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    for column in one.narrow:
        # Folded, not cut, where the terminal is too narrow: no digit may be lost.
        first = column == one.narrow[0]
        table.add_column(Text(column), justify="left" if column in WORDS else "right", overflow="fold", no_wrap=first)
    shown = [one.columns.index(column) for column in one.narrow]
    for row in one.rows:
        table.add_row(*(Text(row[index]) for index in shown))
    return table


def markdown(results: BenchResults) -> str:
    """The tables as GitHub-flavoured Markdown."""
    lines = [f"# {escaped(results.suite)}: {escaped(results.question)}", "", escaped(facts(results)), ""]
    return "\n".join(lines + [line for one in cells(results) for line in section(one)])


def section(one: Cells) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [f"## {escaped(one.title)}", "", _line(one.columns), "| --- |" + " ---: |" * (len(one.columns) - 1)]
    lines += [*map(_line, one.rows), ""]
    return lines + ([escaped(" ".join(one.notes)), ""] if one.notes else [])


def ratio_text(ratio: Ratio | None) -> str:
    """0.923 [0.918, 0.930]: the median and its interval."""
    if ratio is None:
        return ABSENT
    return f"{ratio.median:.3f}" + ("" if ratio.low is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]")


def needed(bar: Bar) -> str:
    return f"at least {bar.at_least:.2f}" if bar.at_least is not None else f"at most {bar.at_most:.2f}"


def _bars(results: BenchResults) -> Cells:
    rows = [
        (
            result.group.name,
            f"{one.bar.case} / {one.bar.against}",
            TITLES[one.bar.measure],
            result.row(one.bar.case).code,
            ratio_text(one.ratio),
            _spread(one.ratio),
            needed(one.bar),
            "yes" if one.reached else "no",
        )
        for result in results.groups
        for one in result.bars
    ]
    columns = ("work", "what", "measure", "code", "ratio [95 %]", "least-most", "must reach", "reached")
    wanted = sum(len(result.group.bars) for result in results.groups)
    missing = (f"{wanted - len(rows)} of {wanted} bars were not measured, see below.",) if len(rows) < wanted else ()
    return Cells(
        title="The bar",
        columns=columns,
        narrow=("work", "what", "ratio [95 %]", "must reach", "reached"),
        rows=tuple(rows),
        notes=("Throughput ratios: median over rounds of the times in the same round.", *missing),
    )


def _group(result: GroupResult) -> Cells:
    group = result.group
    rows = [_row(result, row) for row in result.rows]
    # Alike in every row, the baseline and `triad` included.
    columns = tuple(rows[0]) if rows else ("case",)
    shown = [column for column in columns if column == "case" or column.endswith((RATIO, "ms", "peak ratio"))]
    operator = group.work == "operator"
    sizes = f"d {group.dim}, " + (
        f"{group.batch * group.context} tokens"
        if operator
        else f"{group.layers} layers, batch {group.batch} x {group.context}, vocabulary {group.vocab_size}, "
        + ("compiled" if group.compiled else "eager")
    )
    notes = [f"{sizes}; ratios to {group.baseline}."]
    if operator:
        notes.append(
            "triad moves the bytes that the rewrite must move, so a ratio is the share of the bound that memory sets; "
            "bytes and operations are counted by formula."
        )
    notes += [f"{name}: skipped, {reason}." for name, reason in result.skipped.items()]
    return Cells(
        title=group.name,
        columns=columns,
        narrow=tuple(shown),
        rows=tuple(tuple(row.values()) for row in rows),
        notes=tuple(notes),
    )


def _row(result: GroupResult, row: Row) -> dict[str, str]:
    """The cells of a row by their column's title."""
    found = {"case": row.case, "code": row.code}
    for measure, timing in row.timings.items():
        title, speed = TITLES[measure], timing.tokens_per_second
        found[f"{title} {RATIO}"] = ratio_text(timing.ratio)
        found[f"{title} least-most"] = _spread(timing.ratio)
        if timing.bytes_per_token is None or timing.flops_per_token is None:
            found[f"{title} tokens/s"] = f"{speed:,.0f}"
        else:
            found[f"{title} ms"] = f"{1e3 * result.group.batch * result.group.context / speed:.3f}"
            found[f"{title} GB/s"] = f"{timing.bytes_per_token * speed / 1e9:.1f}"
            found[f"{title} GFLOP/s"] = f"{timing.flops_per_token * speed / 1e9:.1f}"
    if any(one.peak_bytes is not None for one in result.rows):
        found["peak MiB"] = ABSENT if row.peak_bytes is None else f"{row.peak_bytes / MIB:,.0f}"
        found["peak ratio"] = ABSENT if row.peak_ratio is None else f"{row.peak_ratio:.3f}"
    return found if result.group.work == "operator" else found | {"parameters": f"{row.parameters:,}"}


def _spread(ratio: Ratio) -> str:
    return f"{ratio.minimum:.2f}-{ratio.maximum:.2f}"


def _line(texts: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(escaped, texts)) + " |"


def escaped(text: str) -> str:
    """Text as Markdown shows it."""
    # Backslashes before what Markdown would read as a mark, entities for what it would read as HTML.
    for mark in "\\|*_`[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())

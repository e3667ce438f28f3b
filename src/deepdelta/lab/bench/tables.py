"""The tables of a benchmark."""

from deepdelta.lab.bench.config import Bar
from deepdelta.lab.bench.results import BenchResults, GroupResult, Ratio, Row
from deepdelta.lab.views.tables import ABSENT, Column, TextTable, markdown_page, table_of

TITLES = {
    "forward_backward": "forward + backward",
    "step": "full step",
    "forward": "forward",
    "decoding": "decoding",
    "peak": "peak memory",
}
RATIO = "[95 %]"
MIB = 1 << 20


def bench_tables(results: BenchResults) -> list[TextTable]:
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


def markdown(results: BenchResults) -> str:
    """The tables as GitHub-flavoured Markdown."""
    return markdown_page(f"{results.suite}: {results.question}", (facts(results),), bench_tables(results))


def ratio_text(ratio: Ratio) -> str:
    """0.923 [0.918, 0.930]: the median and its interval."""
    return f"{ratio.median:.3f}" + ("" if ratio.low is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]")


def _bars(results: BenchResults) -> TextTable:
    def needed(bar: Bar) -> str:
        return f"at least {bar.at_least:.2f}" if bar.at_least is not None else f"at most {bar.at_most:.2f}"

    rows = [(result, one) for result in results.groups for one in result.bars]
    columns = [
        Column("work", "", lambda row: row[0].group.name),
        Column("what", "", lambda row: f"{row[1].bar.case} / {row[1].bar.against}", words=True),
        Column("measure", "", lambda row: TITLES[row[1].bar.measure], narrow=False),
        Column("code", "", lambda row: row[0].row(row[1].bar.case).code, narrow=False),
        Column(f"ratio {RATIO}", "", lambda row: ratio_text(row[1].ratio)),
        Column("least-most", "", lambda row: _spread(row[1].ratio), narrow=False),
        Column("must reach", "", lambda row: needed(row[1].bar)),
        Column("reached", "", lambda row: "yes" if row[1].reached else "no"),
    ]
    wanted = sum(len(result.group.bars) for result in results.groups)
    missing = (f"{wanted - len(rows)} of {wanted} bars were not measured, see below.",) if len(rows) < wanted else ()
    note = "Throughput ratios: median over rounds of the times in the same round."
    return table_of(rows, columns, title="The bar", notes=(note, *missing))


def _group(result: GroupResult) -> TextTable:
    group = result.group
    rows = [_row(result, row) for row in result.rows]
    # Alike in every row, the baseline and `triad` included.
    titles = tuple(rows[0]) if rows else ("case",)
    shown = ("case", RATIO, "ms", "peak ratio")
    operator = group.work == "operator"
    small = f"{group.layers} residuals, {group.batch} images of 8 x 8, each a token"
    sizes = f"d {group.dim}, " + (
        f"{group.batch * group.context} tokens"
        if operator
        else small
        if group.network is not None
        else f"{group.layers} layers, batch {group.batch} x {group.context}, vocabulary {group.vocab_size}, "
        + ("compiled" if group.compiled else "eager")
    )
    notes = [f"{sizes}; ratios to {group.baseline}."]
    if operator:
        notes.append(
            "triad moves the bytes that the rewrite must move, so a ratio is the share of the bound that memory sets; "
            "bytes and operations are counted by formula."
        )
    if any(row.moved is not None for row in result.rows):
        notes.append(
            "moved / d: numbers that the residual's operations read and write per token and sublayer, forward, in "
            "units of d, without what the branches do."
        )
    notes += [f"{name}: skipped, {reason}." for name, reason in result.skipped.items()]
    return TextTable(
        title=group.name,
        columns=tuple(Column(title, narrow=title.endswith(shown)) for title in titles),
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
    if any(one.moved is not None for one in result.rows):
        found["moved / d"] = ABSENT if row.moved is None else f"{row.moved:.1f}"
    return found if result.group.work == "operator" else found | {"parameters": f"{row.parameters:,}"}


def _spread(ratio: Ratio) -> str:
    return f"{ratio.minimum:.2f}-{ratio.maximum:.2f}"

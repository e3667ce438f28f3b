"""The results of an audit as tables and as a page; no number that is not in audit.json."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from deepdelta.errors import printable
from deepdelta.files import write_text
from deepdelta.lab.audit.findings import NOT_FINITE, AuditResults, Effect, Findings, GateAudit, Regimes, ResidualAudit
from deepdelta.lab.views import audit_figures as figures
from deepdelta.lab.views.audit_figures import row_name
from deepdelta.lab.views.page import SCRIPT, chart, write_page
from deepdelta.lab.views.page import render as render_template
from deepdelta.lab.views.tables import ABSENT, Column, TextTable, markdown_page, render, table_of

ALL = "all"
"""The row of what is done to every sublayer at once."""


def audit_tables(results: AuditResults) -> tuple[TextTable, ...]:
    """What the rewrites do, the spectrum of the shortcut, and what the loss is without parts of them."""
    found = results.findings
    tables = (_rewrites(found), _directions(found), _shortcut(found), _effects(results))
    return tuple(table for table in tables if table is not None)


def audit_summary(results: AuditResults) -> tuple[str, ...]:
    """The outcome in sentences that say no more than the numbers carry."""
    found = results.findings
    sentences = [f"The loss is {found.loss:.4f} nats per token, on {found.tokens:,} tokens of held-out text."]
    gates = [one.gate.values.mean for one in found.residuals if one.gate is not None]
    if gates:
        sentences.append(
            f"Gates (0 keeps, 1 erases, 2 mirrors) average {sum(gates) / len(gates):.2f} "
            f"(sublayers {min(gates):.2f} to {max(gates):.2f})."
        )
    for number, effect in enumerate(found.everywhere):
        if effect.loss_change is None:
            continue
        singles = [(row_name(one.name), one.effects[number]) for one in found.residuals]
        measured = [(name, single.loss_change) for name, single in singles if single.loss_change is not None]
        sentence = f"With '{effect.intervention}' in all sublayers the loss changes by {_change(effect)} nats"
        if measured:
            most = max(measured, key=lambda pair: abs(pair[1]))[0]
            sentence += f"; in a single one it changes most in {most}, by {_change(dict(singles)[most])}"
        sentences.append(f"{sentence}.")
    return tuple(sentences)


def write_audit(results: AuditResults, folder: Path, *, self_contained: bool = False) -> None:
    """Write audit.html and table.md to `folder`, each whole or not at all, and the script of the page beside it.

    Raises:
        UserError: the extra `lab` (Jinja2, plotly) is not installed.
    """
    page = render_audit(results, self_contained=self_contained)
    write_page(folder / "audit.html", page, None if self_contained else SCRIPT)
    write_text(folder / "table.md", audit_markdown(results))


def audit_markdown(results: AuditResults) -> str:
    """The sentences and the tables, with what they depend on."""
    text = f"{results.corpus} (SHA-256 {results.corpus_sha256[:12]}); {results.contexts}."
    facts = (results.facts(results.finished), text, *audit_summary(results))
    return markdown_page(f"Audit of {results.run}, step {results.step}", facts, audit_tables(results))


def print_audit(results: AuditResults, console: Console) -> None:
    """The tables and the sentences."""
    for table in audit_tables(results):
        console.print(render(table))
    for sentence in audit_summary(results):
        console.print(printable(sentence), markup=False, highlight=False, soft_wrap=True)


def render_audit(results: AuditResults, *, self_contained: bool = False) -> str:
    """The page as text."""
    found, rule = results.findings, results.model.residual.rule
    gates, erase_gates = [one.gate for one in found.residuals], [one.erase_gate for one in found.residuals]
    titled = {
        "gates": ("Gate β", figures.gate_distribution(found, gates, rule)),
        "erase-gates": ("Gate of the erase", figures.gate_distribution(found, erase_gates, "erase_only")),
        "regimes": (f"Regimes of the {'erase' if results.model.residual.erases else 'gate'}", figures.regimes(found)),
        "discrepancies": ("Discrepancy", figures.discrepancies(found)),
        "cosines": ("cos(k, X)", figures.cosines(found)),
        "shares": ("Erased, written and changed", figures.state_shares(found)),
        "eigenvalues": ("Eigenvalues other than the trivial ones", figures.eigenvalues(found)),
        "smallest": (
            "Smallest singular value up to each sublayer",
            figures.over_depth(found, "smallest_singular_value", "median over tokens"),
        ),
        "rank": (
            "Directions acted on up to each sublayer",
            figures.over_depth(found, "effective_rank", "mean over tokens"),
        ),
    }
    labels = [effect.intervention for effect in found.everywhere]
    return render_template(
        "audit.html",
        None if self_contained else SCRIPT,
        results=results,
        summary=audit_summary(results),
        tables=audit_tables(results),
        charts={key: chart(key, title, figure) for key, (title, figure) in titled.items()},
        effects=[chart(f"effect-{n}", label, figures.loss_changes(found, label)) for n, label in enumerate(labels)],
    )


def _rewrites(found: Findings) -> TextTable:
    def regime(read: Callable[[Regimes], float]) -> Callable[[ResidualAudit], str]:
        def text(one: ResidualAudit) -> str:
            gate = one.erase_gate or one.gate
            return ABSENT if gate is None else f"{read(gate.regimes):.0%}"

        return text

    def discrepancy(one: ResidualAudit) -> str:
        found = one.discrepancy
        return ABSENT if found is None else _pair(found.rms_before, found.rms_after)

    skip = "Share of rewrites with a strength s = b |k|² below 0.1; they leave the state."
    over = "s > 1.1: it comes back with its sign turned. Or s < 0: it grows."
    erase_gate = "The same of b, where the erase has a gate beside that of the write."
    sizes = "Sizes relative to the state's, root mean square over tokens."
    table = table_of(
        found.residuals,
        [
            Column("sublayer", "From the first.", lambda one: row_name(one.name)),
            Column("gate β", "Mean over tokens, and where the middle 90 % of them lie.", lambda one: _spread(one.gate)),
            Column("erase gate", erase_gate, lambda one: _spread(one.erase_gate)),
            Column("skip", skip, regime(lambda r: r.skip)),
            Column("under", "0.1 <= s < 0.9: part of what is read stays.", regime(lambda r: r.under_relaxed)),
            Column("project", "0.9 <= s <= 1.1: what is read goes.", regime(lambda r: r.project)),
            Column("over", over, regime(lambda r: r.over_relaxed + r.reflect + r.unstable)),
            Column("rms before\nand after", "Root mean square of kᵀX - v, with the same k and v.", discrepancy),
            Column(
                "|cos|",
                "Mean |cos(k, X)| over tokens and value channels.",
                lambda one: _number(one.absolute_cosine),
            ),
            Column("erased\nwritten", sizes, lambda one: _pair(one.erased, one.written)),
            Column("changed", "Both together: |X' - X| / |X|.", lambda one: _number(one.changed)),
        ],
        title="What the rewrites do",
        notes=(f"On {found.tokens:,} tokens.",),
    )
    # A column of a part that the rule does not have says nothing.
    shown = [n for n, cells in enumerate(zip(*table.rows, strict=True)) if set(cells) != {ABSENT}]
    rows = tuple(tuple(row[n] for n in shown) for row in table.rows)
    return replace(table, columns=tuple(table.columns[n] for n in shown), rows=rows)


def _directions(found: Findings) -> TextTable | None:
    """How much of the state lies along other directions than k."""
    names = dict.fromkeys(other.name for one in found.residuals for other in one.alternatives)
    if not names:
        return None

    def text(name: str, one: ResidualAudit) -> str:
        cells = [f"{other.cosine:.3f}\n{other.chance:.3f}" for other in one.alternatives if other.name == name]
        return cells[0] if cells else ABSENT

    said = {
        "heads": "The branch's output and the state in blocks of the width, as many as attention has heads.",
        "value": "What attention has read of the values, before its output map.",
        "snapshot": "The state a layer before.",
    }
    columns = [
        Column("sublayer", "From the first.", lambda one: row_name(one.name)),
        Column("k", "The direction that it has.", lambda one: _number(one.absolute_cosine)),
        *(Column(name, said[name], partial(text, name)) for name in names),
    ]
    note = "Mean |cos| with the state; below it, what a random direction has. An erase takes away what k finds."
    return table_of(found.residuals, columns, title="Directions an erase could take", notes=(note,))


def _shortcut(found: Findings) -> TextTable | None:
    shortcut = found.shortcut
    if shortcut is None:
        return None
    things = (
        ("eigenvalues, modulus", shortcut.eigenvalue_moduli),
        ("eigenvalues, |argument|", shortcut.eigenvalue_arguments),
        ("singular values", shortcut.singular_values),
    )
    names = {"mean": "mean", "5 %": "q05", "median": "median", "95 %": "q95"}
    columns = [
        Column("of the product of all erases", "Over tokens and its nontrivial directions.", lambda one: one[0]),
        *(
            Column(title, title, partial(lambda name, one: f"{getattr(one[1], name):.3f}", name))
            for title, name in names.items()
        ),
    ]
    ranks = ", ".join(f"{rank:.1f} above {threshold}" for threshold, rank in shortcut.effective_rank.items())
    note = (
        f"{shortcut.factors} rewrites, {shortcut.tokens} tokens; of each the {shortcut.nontrivial} values that "
        f"can differ from 1. Singular values of I - A: {ranks}."
    )
    return table_of(things, columns, title="Composed shortcut", notes=(note,))


def _effects(results: AuditResults) -> TextTable:
    found, config = results.findings, results.model.residual
    labels = [effect.intervention for effect in found.everywhere]
    lacking = {one.intervention: one.remark for one in found.everywhere if one.remark not in (None, NOT_FINITE)}
    notes = ["Loss with the part replaced minus loss as it is, nats per token, ± the 95 % t-interval over windows."]
    notes += [f"No '{label}': {reason}." for label, reason in lacking.items()]
    if config.rule == "two_gate":
        notes.append("The gate that is set is that of the erase.")
    columns = [Column("sublayer", f"The one where it is done; '{ALL}': in every one at once.", lambda one: one[0])]
    for number, label in enumerate(labels):
        if label not in lacking:
            say = partial(lambda number, one: _change(one[1][number], "\n"), number)
            columns.append(Column(label, "What is replaced, for every token.", say))
    things = [(row_name(one.name), one.effects) for one in found.residuals] + [(ALL, found.everywhere)]
    return table_of(things, columns, title="Change of the loss", notes=notes)


def _spread(gate: GateAudit | None) -> str:
    return ABSENT if gate is None else f"{gate.values.mean:.2f}\n{gate.values.q05:.2f}-{gate.values.q95:.2f}"


def _pair(one: float | None, other: float | None) -> str:
    return f"{_number(one)}\n{_number(other)}"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def _change(effect: Effect, between: str = " ") -> str:
    if (change := effect.change) is None:
        return "not finite"
    reach = "" if change.t_interval is None else f"{between}± {change.t_interval.high - change.mean:.4f}"
    return f"{change.mean:+.4f}{reach}"

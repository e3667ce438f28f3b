"""The results of an audit as tables and as one self-contained page; no number that is not in audit.json."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deepdelta.errors import printable
from deepdelta.files import write_text
from deepdelta.lab.audit.audit import INTERVENTIONS
from deepdelta.lab.audit.findings import AuditResults, Effect, Findings, Regimes, ResidualAudit
from deepdelta.lab.audit.shortcut import Distribution
from deepdelta.lab.views import audit_figures as figures
from deepdelta.lab.views.audit_figures import row_name
from deepdelta.lab.views.page import SCRIPT, Chart, chart, write_page
from deepdelta.lab.views.page import render as render_template
from deepdelta.lab.views.tables import ABSENT, Column, TextTable, markdown_page, render

ALL = "all"
"""The row of what is done to every sublayer at once."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Pictures under a title, with how to read them."""

    title: str
    text: str
    charts: tuple[Chart, ...]


def audit_tables(results: AuditResults) -> tuple[TextTable, ...]:
    """What the rewrites do, the spectrum of the shortcut, and what the loss is without parts of them."""
    tables = (_rewrites(results.findings), _shortcut(results.findings), _effects(results))
    return tuple(table for table in tables if table is not None)


def audit_summary(results: AuditResults) -> tuple[str, ...]:
    """The outcome in sentences that say no more than the numbers carry."""
    found = results.findings
    sentences = [f"The loss is {found.loss:.4f} nats per token, on {found.tokens:,} tokens of held-out text."]
    gates = [one.gate.values.mean for one in found.residuals if one.gate is not None]
    if gates:
        sentences.append(
            f"Gates, which may lie between 0 and 2, average {sum(gates) / len(gates):.2f} "
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
        UserError: the extra `study` (Jinja2, plotly) is not installed.
    """
    page = render_audit(results, self_contained=self_contained)
    write_page(folder / "audit.html", page, self_contained=self_contained)
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
    return render_template(
        "audit.html",
        None if self_contained else SCRIPT,
        results=results,
        summary=audit_summary(results),
        tables=audit_tables(results),
        sections=_sections(results),
    )


def _rewrites(found: Findings) -> TextTable:
    def regime(read: Callable[[Regimes], float]) -> Callable[[ResidualAudit], str]:
        def text(one: ResidualAudit) -> str:
            gate = one.erase_gate or one.gate
            return ABSENT if gate is None else f"{read(gate.regimes):.0%}"

        return text

    wanted: list[tuple[Column, Callable[[ResidualAudit], str]]] = [
        (
            Column(title="gate β", help="Mean over tokens, and where the middle 90 % of them lie."),
            lambda one: ABSENT if one.gate is None else _spread(one.gate.values),
        ),
        (
            Column(title="erase gate", help="The same of b, where the erase has a gate beside that of the write."),
            lambda one: ABSENT if one.erase_gate is None else _spread(one.erase_gate.values),
        ),
        (
            Column(title="skip", help="Share of rewrites with a strength s = b |k|² below 0.1; they leave the state."),
            regime(lambda r: r.skip),
        ),
        (Column(title="under", help="0.1 <= s < 0.9: part of what is read stays."), regime(lambda r: r.under_relaxed)),
        (Column(title="project", help="0.9 <= s <= 1.1: what is read goes."), regime(lambda r: r.project)),
        (
            Column(title="over", help="s > 1.1: it comes back with its sign turned. Or s < 0: it grows."),
            regime(lambda r: r.over_relaxed + r.reflect + r.unstable),
        ),
        (
            Column(title="rms before\nand after", help="Root mean square of kᵀX - v, with the same k and v."),
            lambda one: (
                ABSENT if one.discrepancy is None else _pair(one.discrepancy.rms_before, one.discrepancy.rms_after)
            ),
        ),
        (
            Column(title="|cos|", help="Mean |cos(k, X)| over tokens and value channels."),
            lambda one: _number(one.absolute_cosine),
        ),
        (
            Column(title="erased\nwritten", help="Sizes relative to the state's, root mean square over tokens."),
            lambda one: _pair(one.erased, one.written),
        ),
        (Column(title="changed", help="Both together: |X' - X| / |X|."), lambda one: _number(one.changed)),
    ]
    texts = [(column, [cell(one) for one in found.residuals]) for column, cell in wanted]
    # A column of a part that the rule does not have says nothing.
    shown = [(column, cells) for column, cells in texts if set(cells) != {ABSENT}]
    names = [row_name(one.name) for one in found.residuals]
    return TextTable(
        title="What the rewrites do",
        columns=(Column(title="sublayer", help="From the first."), *(column for column, _ in shown)),
        rows=tuple(zip(names, *(cells for _, cells in shown), strict=True)),
        notes=(f"On {found.tokens:,} tokens.",),
    )


def _shortcut(found: Findings) -> TextTable | None:
    shortcut = found.shortcut
    if shortcut is None:
        return None
    rows = (
        ("eigenvalues, modulus", *_quantiles(shortcut.eigenvalue_moduli)),
        ("eigenvalues, |argument|", *_quantiles(shortcut.eigenvalue_arguments)),
        ("singular values", *_quantiles(shortcut.singular_values)),
    )
    ranks = ", ".join(f"{rank:.1f} above {threshold}" for threshold, rank in shortcut.effective_rank.items())
    return TextTable(
        title="Composed shortcut",
        columns=(
            Column(title="of the product of all erases", help="Over tokens and its nontrivial directions."),
            *(Column(title=name, help=name) for name in ("mean", "5 %", "median", "95 %")),
        ),
        rows=rows,
        notes=(
            f"{shortcut.factors} rewrites, {shortcut.tokens} tokens; of each the {shortcut.nontrivial} values that "
            f"can differ from 1. Singular values of I - A: {ranks}.",
        ),
    )


def _effects(results: AuditResults) -> TextTable:
    found, config = results.findings, results.model.residual
    rows = [(row_name(one.name), one.effects) for one in found.residuals]
    rows.append((ALL, found.everywhere))
    labels = [effect.intervention for effect in found.everywhere]
    lacking = {label: reason for label in labels if (reason := INTERVENTIONS[label].lacking(config)) is not None}
    shown = [n for n, label in enumerate(labels) if label not in lacking]
    notes = ["Loss with the part replaced minus loss as it is, nats per token, ± the 95 % t-interval over windows."]
    notes += [f"No '{label}': {reason}." for label, reason in lacking.items()]
    if config.rule == "two_gate":
        notes.append("The gate that is set is that of the erase.")
    return TextTable(
        title="Change of the loss",
        columns=(
            Column(title="sublayer", help=f"The one where it is done; '{ALL}': in every one at once."),
            *(Column(title=labels[n], help="What is replaced, for every token.") for n in shown),
        ),
        rows=tuple((name, *(_change(effects[n], "\n") for n in shown)) for name, effects in rows),
        notes=tuple(notes),
    )


def _sections(results: AuditResults) -> tuple[Section, ...]:
    found, rule = results.findings, results.model.residual.rule
    gates = figures.gate_distribution(found, [one.gate for one in found.residuals], rule)
    erase_gates = figures.gate_distribution(found, [one.erase_gate for one in found.residuals], "erase_only")
    regime_title = "Regimes of the erase" if results.model.residual.erases else "Regimes of the gate"
    sections = (
        _section(
            "What the gates do",
            "Each row is one sublayer, the first on top; the stronger a cell's colour, the more tokens have their gate "
            "there. The tick is the row's mean. A strength s = b |k|² leaves 1 - s of what is read: below 0.1 the "
            "rewrite skips, near 1 it projects, beyond it what was read comes back with its sign turned.",
            chart("gates", "Gate β", gates),
            chart("erase-gates", "Gate of the erase", erase_gates),
            chart("regimes", regime_title, figures.regimes(found)),
        ),
        _section(
            "What is read and what is changed",
            "The discrepancy kᵀX - v before (ring) and after (disc) each rewrite. The cosine says how much of a value "
            "channel lies along k: for directions that have nothing to do with the state it scatters around 0 by "
            "1 / √width. Shares are sizes relative to that of the state, root mean squares over tokens.",
            chart("discrepancies", "Discrepancy", figures.discrepancies(found)),
            chart("cosines", "cos(k, X)", figures.cosines(found)),
            chart("shares", "Erased, written and changed", figures.state_shares(found)),
        ),
        _section(
            "The composed shortcut",
            "With the writes left out, the sublayers multiply a token's state by a matrix, the product of all erases. "
            "An eigenvalue near 1 is a direction that survives all layers, one near 0 one that is erased, a negative "
            "or complex one is turned. The rank is the number of directions that the product acts on by more than 0.1.",
            chart("eigenvalues", "Eigenvalues other than the trivial ones", figures.eigenvalues(found)),
            chart(
                "smallest",
                "Smallest singular value up to each sublayer",
                figures.over_depth(found, "smallest_singular_value", "median over tokens"),
            ),
            chart(
                "rank",
                "Directions acted on up to each sublayer",
                figures.over_depth(found, "effective_rank", "mean over tokens"),
            ),
        ),
        _section(
            "What the loss is without it",
            "The change of the loss when a part of one sublayer's rewrites is replaced for every token, everything "
            "else as it is, with its 95 % t-interval over windows. Right of zero: a higher loss.",
            *(
                chart(f"effect-{number}", label, figures.loss_changes(found, label))
                for number, label in enumerate(effect.intervention for effect in found.everywhere)
            ),
        ),
    )
    return tuple(section for section in sections if section.charts)


def _section(title: str, text: str, *charts: Chart | None) -> Section:
    return Section(title=title, text=text, charts=tuple(chart for chart in charts if chart is not None))


def _spread(values: Distribution) -> str:
    return f"{values.mean:.2f}\n{values.q05:.2f}-{values.q95:.2f}"


def _quantiles(values: Distribution) -> tuple[str, ...]:
    return tuple(f"{value:.3f}" for value in (values.mean, values.q05, values.median, values.q95))


def _pair(one: float | None, other: float | None) -> str:
    return f"{_number(one)}\n{_number(other)}"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def _change(effect: Effect, between: str = " ") -> str:
    if effect.loss_change is None:
        return "not finite"
    reach = "" if effect.high is None else f"{between}± {effect.high - effect.loss_change:.4f}"
    return f"{effect.loss_change:+.4f}{reach}"

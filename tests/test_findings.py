"""The tables of the findings are those of the committed results."""

import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest

from deepdelta.config import from_plain
from deepdelta.report import detail_tables, markdown_table
from deepdelta.studies.config import load_study
from deepdelta.studies.results import load_results
from deepdelta.studies.statistics import contrasts, paired
from deepdelta.tables import markdown_cells
from deepdelta.tasks.results import TaskResults, main_table

ROOT = Path(__file__).parents[1]
PAGES = ("findings", "sizes", "attribution", "beyond-text")
FINDINGS = "\n".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in PAGES)
STUDIES = sorted(set(re.findall(r"\.\./results/([\w-]+)/results\.json", FINDINGS)) - {"quick"})
SIZED = ("additive", "additive-convolution", "delta-token-random")
AUDITS = sorted(set(re.findall(r"\.\./results/([\w-]+)/audit\.json", FINDINGS)))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_s_tables(name: str) -> None:
    results = load_results(ROOT / "results" / name / "results.json")
    assert markdown_table(results).strip() in FINDINGS
    contrasts = next(table for table in detail_tables(results) if table.title.startswith("Comparisons"))
    # Without its heading, which the page has of its own.
    assert markdown_cells(contrasts).split("\n", 2)[2].strip() in FINDINGS
    assert all(len(condition.runs) >= 5 for condition in results.conditions)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"results/([\w-]+)/table\.md#effects-of-factors", FINDINGS))))
def test_effects_of_factors(name: str) -> None:
    results = load_results(ROOT / "results" / name / "results.json")
    effects = next(table for table in detail_tables(results) if table.title == "Effects of factors")
    assert markdown_cells(effects).split("\n", 2)[2].strip() in FINDINGS


def test_the_means_of_a_control_matrix() -> None:
    results = load_results(ROOT / "results" / "control-matrix" / "results.json")
    states = ("", "-4-repeat-channel", "-4-repeat-token", "-4-conv-channel", "-4-conv-token")
    for rule in ("additive", "additive-erase", "write-only", "delta", "erase-only"):
        losses = [list(results.condition(rule + state).losses().values()) for state in states]
        cells = [f"{statistics.fmean(own):.3f} ± {statistics.stdev(own):.3f}" for own in losses]
        assert all(len(own) == 5 for own in losses)
        assert f"| {rule} | {' | '.join(cells)} |" in FINDINGS


@pytest.mark.parametrize("name", sorted(set(re.findall(r"results/task-(recall|digits|dynamics)/table\.md", FINDINGS))))
def test_a_task_s_table(name: str) -> None:
    file = ROOT / "results" / f"task-{name}" / "results.json"
    results = from_plain(TaskResults, json.loads(file.read_text(encoding="utf-8")), where=str(file))
    assert markdown_cells(dataclasses.replace(main_table(results), title="")).strip() in FINDINGS
    assert all(len(condition.metrics) >= 5 for condition in results.conditions)


@pytest.mark.parametrize("name", AUDITS)
def test_an_audit_s_rows(name: str) -> None:
    found = json.loads((ROOT / "results" / name / "audit.json").read_text(encoding="utf-8"))["findings"]
    for residual in found["residuals"]:
        effect = next(one for one in residual["effects"] if one["intervention"] == "erase cut")
        row = f"| {residual['name'].removeprefix('layers.')} | {residual['gate']['values']['mean']:.2f} |"
        end = f"| {effect['loss_change']:+.4f} ({effect['low']:+.4f} to {effect['high']:+.4f}) |"
        assert any(line.startswith(row) and line.endswith(end) for line in FINDINGS.splitlines()), residual["name"]


def test_the_headline_rests_on_what_its_search_chose() -> None:
    search = json.loads((ROOT / "results" / "parameterization" / "search.json").read_text(encoding="utf-8"))
    headline, candidates = load_study("headline"), load_study("parameterization")
    (winner,) = search["winners"]
    residual = candidates.conditions[winner].changes["model"]["residual"]
    assert headline.conditions[winner].changes["model"]["residual"] == residual
    for tuned in search["tuned"].values():
        finished = [(loss, rate) for rate, loss in zip(tuned["grid"], tuned["losses"], strict=True) if loss is not None]
        assert tuned["lr"] == min(finished)[1] and not set(tuned["seeds"]) & set(headline.seeds)
    assert candidates.search is not None
    assert not set(headline.seeds) & {seed for rung in candidates.search.rungs for seed in rung.seeds}


def test_the_sizes() -> None:
    for size, of in (("small", "d 32, 2 layers"), ("medium", "d 64, 4 layers"), ("large", "d 96, 6 layers")):
        results = load_results(ROOT / "results" / "sizes" / size / "results.json")
        plain, convolution, delta = (results.condition(one).losses() for one in SIZED)
        changes = []
        for one, other in ((convolution, plain), (delta, plain), (delta, convolution)):
            found = paired([one[seed] - other[seed] for seed in results.seeds])
            assert found.n == 5 and found.t_interval is not None
            changes.append(f"{found.mean:+.3f} ({found.t_interval.low:+.3f} to {found.t_interval.high:+.3f})")
        cells = (f"{of}, {results.budget.steps} steps", f"{statistics.fmean(plain.values()):.3f}", *changes)
        assert f"| {' | '.join(cells)} |" in FINDINGS


@pytest.mark.parametrize(
    ("condition", "reference"),
    [
        ("delta-token-random", "additive"),
        ("additive-convolution", "additive"),
        ("expanded-normed-token-random", "additive-convolution"),
        ("write-only-token-random", "expanded-normed-token-random"),
        ("delta-token-random", "write-only-token-random"),
        ("ddl", "additive"),
    ],
)
def test_the_readme_s_rows(condition: str, reference: str) -> None:
    cells = []
    for name in ("headline", "headline-tinyshakespeare"):
        results = load_results(ROOT / "results" / name / "results.json")
        assert results.budgets == ("flops", "time")
        for budget in results.budgets:
            (found,) = (
                one.comparison
                for one in contrasts(results)
                if (one.condition, one.reference, one.budget) == (condition, reference, budget)
            )
            assert found.t_interval is not None and found.adjusted_p is not None
            low, high = found.t_interval.low, found.t_interval.high
            cell = f"{found.mean:+.3f} ({low:+.3f} to {high:+.3f})"
            apart = (low > 0) == (high > 0)
            cells.append(
                cell + (f", p = {found.adjusted_p:.2f} corrected" if apart and found.adjusted_p > 0.05 else "")
            )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(cells)} |" in readme


def test_the_headline_made_again_overlaps_the_committed_one() -> None:
    first, again = (load_results(ROOT / "results" / name / "results.json") for name in ("headline", "headline-again"))
    assert first.commit != again.commit and first.corpus == again.corpus
    one, other = contrasts(first), contrasts(again)
    assert len(one) == len(other) == 20
    for a, b in zip(one, other, strict=True):
        assert (a.condition, a.reference, a.budget) == (b.condition, b.reference, b.budget)
        own, new = a.comparison.t_interval, b.comparison.t_interval
        assert own is not None and new is not None and own.low <= new.high and new.low <= own.high
        assert abs(a.comparison.mean - b.comparison.mean) < 0.0095
    assert [c.tuned and c.tuned.lr for c in first.conditions] == [c.tuned and c.tuned.lr for c in again.conditions]

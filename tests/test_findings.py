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
from deepdelta.tables import markdown_cells
from deepdelta.tasks.results import TaskResults, main_table

ROOT = Path(__file__).parents[1]
PAGES = ("findings", "beyond-text", "small-embeddings")
FINDINGS = "\n".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in PAGES)
STUDIES = sorted(set(re.findall(r"\.\./results/([\w-]+)/results\.json", FINDINGS)) - {"quick"})
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


@pytest.mark.parametrize("name", ["control-matrix", "small-embeddings-matrix"])
def test_the_means_of_a_control_matrix(name: str) -> None:
    results = load_results(ROOT / "results" / name / "results.json")
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


@pytest.mark.parametrize(
    ("found", "confirmed"), [("parameterization", "headline"), ("small-embeddings-search", "small-embeddings")]
)
def test_a_headline_rests_on_what_its_search_chose(found: str, confirmed: str) -> None:
    search = json.loads((ROOT / "results" / found / "search.json").read_text(encoding="utf-8"))
    headline, candidates = load_study(confirmed), load_study(found)
    (winner,) = search["winners"]
    residual = candidates.conditions[winner].changes["model"]["residual"]
    assert headline.conditions[winner].changes["model"]["residual"] == residual
    for tuned in search["tuned"].values():
        finished = [(loss, rate) for rate, loss in zip(tuned["grid"], tuned["losses"], strict=True) if loss is not None]
        assert tuned["lr"] == min(finished)[1] and not set(tuned["seeds"]) & set(headline.seeds)
    assert candidates.search is not None
    assert not set(headline.seeds) & {seed for rung in candidates.search.rungs for seed in rung.seeds}

"""The pages of a study, of an audit and of a benchmark as people meet them, in Debian's Chromium: make test-browser."""

import csv
import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from browsing import LAYOUT, NASTY, SIZES, focused, opened, serious
from deepdelta.cli import main
from deepdelta.lab import runner
from deepdelta.lab.analysis.results import StudyResults
from deepdelta.lab.analysis.stored import load_stored
from deepdelta.lab.audit.findings import AuditResults
from deepdelta.lab.experiments.places import Places
from deepdelta.lab.views import write_report
from deepdelta.lab.views.audit import write_audit
from tiny_runs import RUNS, study_from

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("unchecked")]
BESIDE = ("plotly.min.js",)
STUDY = f"""
name = "tiny"
question = "What do two seeds tell?"
baseline = "additive"
seeds = [0, 1]
cost_rounds = 2
rewrite_tokens = 70
[train]
steps = 12
eval_every = 2
eval_tokens = 64
final_eval_tokens = 200
{RUNS}
[conditions.additive]
summary = "x + F(x)"
changes.model.residual = {{ rule = "additive", value_channels = 1, expansion = "repeat" }}
[conditions.renamed]
summary = "a gated target replaces what was read"
control = "write-only"
changes.model.residual = {{ rule = "delta", value_channels = 2, expansion = "repeat" }}
[conditions.write-only]
summary = "a gated target is written"
changes.model.residual = {{ rule = "write_only", value_channels = 2, expansion = "repeat" }}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResults]:
    """A study that ran; then a condition gets a name that wants to be markup."""
    folder = tmp_path_factory.mktemp("study")
    results = runner.run_study(
        study_from(STUDY, folder), folder / "out", places=Places(workers=1), command="deepdelta study tiny"
    )
    renamed = tuple(
        dataclasses.replace(one, name=NASTY) if one.name == "renamed" else one for one in results.conditions
    )
    contrasts = tuple(
        dataclasses.replace(one, condition=NASTY) if one.condition == "renamed" else one for one in results.contrasts
    )
    few = tuple(NASTY if one == "renamed" else one for one in results.headline.without_interval)
    headline = dataclasses.replace(results.headline, without_interval=few)
    return folder, dataclasses.replace(results, conditions=renamed, contrasts=contrasts, headline=headline)


@pytest.fixture(scope="module")
def files(study: tuple[Path, StudyResults]) -> dict[str, Path]:
    folder, results = study
    write_report(results, folder / "pages" / "report.html")
    main(["audit", str(folder / "out/runs/renamed-seed0"), "--tokens", "64", "--out", str(folder / "audit")])
    audit = load_stored(AuditResults, folder / "audit" / "audit.json", "deepdelta audit")
    write_audit(dataclasses.replace(audit, run=NASTY), folder / "pages")
    shutil.copy(Path(__file__).parents[1] / "results/bench-bar/results.json", folder / "pages")
    main(["bench", "--redraw", str(folder / "pages")])
    return {name: folder / "pages" / f"{name}.html" for name in ("report", "audit", "plot")}


def drawn(page: Any) -> list[str]:
    """The keys of all pictures, once they have their tools."""
    keys: list[str] = page.eval_on_selector_all("[data-plot]", "all => all.map(one => one.dataset.plot)")
    page.wait_for_function(f"document.querySelectorAll('.tools').length === {len(keys)}")
    return keys


@pytest.mark.parametrize("name", ["report", "audit"])
def test_every_picture_draws_and_has_its_tools_and_words(chromium: Any, files: dict[str, Path], name: str) -> None:
    with opened(chromium, files[name], beside=BESIDE) as page:
        keys = drawn(page)
        assert len(keys) >= 7 and page.locator(".plot:empty").count() == 0
        for key in keys:
            plot = page.locator(f"[id='{key}']")
            marks = ".trace path, .trace image, .hm image, .point path, .points path, .boxlayer path"
            assert plot.locator(marks).count() > 0, key
            assert len(plot.get_attribute("aria-label")) > 30 and plot.get_attribute("tabindex") == "0"
            assert plot.locator("xpath=..").locator(".tools button").count() == 6
        assert page.locator("h1, b, h3", has_text=NASTY).count() > 0
        assert page.locator("script:not([type])").count() == 2  # plotly's and the page's own


def test_keys_alone_read_zoom_tabulate_and_save(
    chromium: Any, files: dict[str, Path], study: tuple[Path, StudyResults]
) -> None:
    condition = study[1].conditions[0]
    with opened(chromium, files["report"], beside=BESIDE) as page:
        drawn(page)
        reached = list(focused(page))
        for wanted in ("curves", "difference", "training FLOPs", NASTY, "Table", "SVG", "CSV", "the operator"):
            assert wanted in reached
        page.focus("#curves")
        reading = page.locator("#curves + script + .reading")
        page.keyboard.press("ArrowRight")
        first = reading.inner_text()
        page.keyboard.press("ArrowRight")
        means = [run.curve for run in condition.runs]
        validations = [
            sum(values) / 2
            for values in zip(
                *([p.validation_loss for p in curve if p.validation_loss is not None] for curve in means), strict=True
            )
        ]
        assert f": {float(f'{validations[1]:.6g}')}" in reading.inner_text() and reading.inner_text() != first
        assert "series: additive" in reading.inner_text() and page.locator("#curves .hovertext").count() == 1
        page.keyboard.press("ArrowDown")
        assert f"series: {NASTY}" in reading.inner_text()
        ranges = "[curves._fullLayout.xaxis.range, curves._fullLayout.yaxis.range].flat()"
        before = page.evaluate(ranges)
        page.keyboard.press("+")
        low, high, *_ = page.evaluate(ranges)
        assert high - low == pytest.approx(0.7 * (before[1] - before[0]))
        page.keyboard.press("0")
        assert page.evaluate(ranges) == pytest.approx(before)
        tools = page.locator("#curves ~ .tools button")
        tools.nth(3).focus()
        page.keyboard.press("Enter")
        table = page.locator("#curves ~ .data table")
        titles = table.locator("th").all_inner_texts()
        rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
        seeds = sum(len(validations) for one in study[1].conditions for _ in one.runs)
        assert len(rows) == seeds + len(validations) * len(study[1].conditions)
        tools.nth(5).focus()
        with page.expect_download() as saving:
            page.keyboard.press("Enter")
        assert saving.value.suggested_filename == "curves.csv"
        text = Path(saving.value.path()).read_text(encoding="utf-8")
        assert list(csv.reader(io.StringIO(text, newline=""))) == [titles, *rows]
        per_token = condition.flops_per_token * study[1].budget.tokens_per_step
        for row in (dict(zip(titles, row, strict=True)) for row in rows[:3]):
            assert float(row["training FLOPs"]) == pytest.approx(per_token * float(row["optimiser steps"]), rel=1e-4)
        tools.nth(4).focus()
        with page.expect_download() as saving:
            page.keyboard.press("Enter")
        tree = ElementTree.parse(saving.value.path())
        texts = [element.text for element in tree.iter() if element.tag.endswith("text")]
        assert "optimiser steps" in texts and not [one for one in tree.iter() if one.tag.endswith("script")]


def test_losses_lie_against_what_is_pressed_and_conditions_hide(chromium: Any, files: dict[str, Path]) -> None:
    with opened(chromium, files["report"], beside=BESIDE) as page:
        drawn(page)
        steps = page.evaluate("curves.data[0].x.at(-1)")
        for title, key in (
            ("training FLOPs", "flops"),
            ("seconds of training", "seconds"),
            ("bytes moved in training", "bytes"),
        ):
            page.get_by_role("button", name=title).click()
            assert page.locator("#curves .xtitle").text_content() == title
            assert page.evaluate("curves.data[0].x.at(-1) === curves.data[0].meta.x['" + key + "'].at(-1)")
            assert page.evaluate("curves.data[0].x.at(-1)") != steps
            low, high = page.evaluate("curves._fullLayout.xaxis.range")
            assert low <= 0 and page.evaluate("curves.data[0].x.at(-1)") <= high
        lines = page.locator("#curves .scatterlayer .trace").count()
        page.locator("button[data-condition='1']").click()
        assert page.locator("#curves .scatterlayer .trace").count() < lines


@pytest.mark.parametrize("name", ["report", "audit", "plot"])
@pytest.mark.parametrize(("width", "theme"), SIZES)
def test_nothing_overlaps_or_is_cut_and_axe_finds_nothing_serious(
    chromium: Any, files: dict[str, Path], name: str, width: int, theme: str
) -> None:
    with opened(chromium, files[name], width, theme, beside=BESIDE) as page:
        drawn(page)
        assert page.evaluate(LAYOUT) == []
        page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
        for table in page.get_by_role("button", name="as a table").all():
            table.click()
        assert page.evaluate(LAYOUT) == []
        assert serious(page) == []


@pytest.mark.parametrize("name", ["report", "audit", "plot"])
def test_every_page_leads_to_the_operator(chromium: Any, files: dict[str, Path], name: str) -> None:
    with opened(chromium, files[name], beside=(*BESIDE, "operator.html")) as page:
        page.get_by_role("link", name="the operator").click()
        assert page.inner_text("#regime")


def test_a_page_alone_holds_its_script_and_the_operator(
    chromium: Any, study: tuple[Path, StudyResults], tmp_path: Path
) -> None:
    write_report(study[1], tmp_path / "report.html", self_contained=True)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    with opened(chromium, tmp_path / "report.html") as page:
        drawn(page)
        page.get_by_text("to move by hand").click()
        operator = page.frame_locator("iframe")
        operator.locator("#beta-number").fill("2")
        assert operator.locator("#regime").inner_text() == "Reflection"

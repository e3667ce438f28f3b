"""The table in its three forms, the sentences, the pictures and the page: equal numbers, nothing loaded, no markup."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from deepdelta.config import to_plain
from deepdelta.errors import UserError
from deepdelta.lab.analysis.results import CurvePoint, NGram, Primary, RewriteSummary, StudyResults, load_results
from deepdelta.lab.analysis.statistics import paired
from deepdelta.lab.views import figures as pictures
from deepdelta.lab.views import render_study, summarise, write_report
from deepdelta.lab.views.page import render_page
from deepdelta.lab.views.study import main_table
from deepdelta.lab.views.tables import markdown_table, si, verdict
from report_samples import HOSTILE, Page, anew, bare, flat, many_seeds, markdown_rows, plain, rewrite, run, study
from tiny_runs import without_curves


@pytest.mark.parametrize("results", [study(), many_seeds(), bare()], ids=["three seeds", "six seeds", "bare"])
def test_three_forms_show_the_same_cells(results: StudyResults) -> None:
    cells = main_table(results)
    expected = [[" ".join(column.title.split()) for column in cells.columns], *flat(cells.rows)]
    assert markdown_rows(markdown_table(cells)) == expected
    page = Page(render_page(results))
    assert [[" ".join(cell.split()) for cell in row] for row in page.rows["results"]] == expected
    # A wide terminal loses no character of any cell, a narrow one cuts none of those that it shows.
    for width in (200, 60):
        console = Console(file=StringIO(), width=width, color_system=None)
        console.print(render_study(results, width))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in shown
        if width == 200:
            assert all(line in shown for row in cells.rows for cell in row for line in cell.split("\n"))


def test_counted_ngrams_stand_under_the_networks() -> None:
    cells = main_table(anew(study(), ngram=NGram(order=5, losses={0: 1.5, 2: 1.7})))
    assert cells.rows[-1][:4] == ("5-gram\n(counted)", "1.6000", "1.5000\n-\n1.7000", "-")
    assert any("counted on each seed's own training batches" in note for note in cells.notes)
    assert len(main_table(study()).rows) == len(cells.rows) - 1


def test_the_primary_contrast_comes_first_with_what_was_written_before_it() -> None:
    results = anew(many_seeds(), primary=Primary(condition="write only", refuted="it is above 0", stop="six seeds"))
    finding = verdict(next(one for one in results.contrasts if one.condition == "write only").comparison)
    assert results.answer is not None
    assert summarise(results).headline.startswith(f"The primary contrast, write only against additive: {finding}. ")
    note = "primary contrast write only against additive; refuted if it is above 0; stop rule: six seeds."
    assert any(note in one for one in main_table(results).notes)
    assert many_seeds().answer is None and "primary" not in summarise(many_seeds()).headline


def test_cells_are_the_numbers_of_the_study() -> None:
    cells = main_table(study())
    titles = [column.title for column in cells.columns]
    assert not any("interval" in title or "Holm" in title for title in titles)
    row = dict(zip(titles, cells.rows[2], strict=True))
    assert row["condition"] == "write only"
    assert row["loss"] == "1.6967"
    assert row["by seed"] == "1.6640\n1.7160\n1.7100"
    assert row["change"] == "+0.0060"  # (-0.050 + 0.058 + 0.010) / 3
    assert row["resolves"] == f"{paired([-0.05, 0.058, 0.01]).smallest_resolvable:.4f}"
    assert row["params"] == "805 k"
    assert row["FLOPs"] == "5.88 M\n(1.20x)"
    assert row["speed"] == "0.71x\n0.68-0.73"
    assert row["memory"] == "1.22x"
    assert any("from 5 paired seeds on" in note for note in cells.notes)


def test_intervals_appear_with_enough_seeds() -> None:
    results = many_seeds()
    cells = main_table(results)
    row = dict(zip((column.title for column in cells.columns), cells.rows[1], strict=True))
    comparison = results.against_baseline()[0].comparison
    assert comparison.t_interval is not None and comparison.p_value is not None
    assert row["95 %\ninterval"] == f"{comparison.t_interval.low:+.4f}\nto {comparison.t_interval.high:+.4f}"
    # Two comparisons: the smaller p-value doubles.
    assert comparison.adjusted_p == pytest.approx(2 * comparison.p_value)
    assert row["p\n(Holm)"] == f"{2 * comparison.p_value:.2g}"


def test_diverged_runs_are_shown_and_left_out_of_means() -> None:
    results = study()
    first, second, third = results.conditions
    second = dataclasses.replace(second, runs=(second.runs[0], run(1, None), second.runs[2]))
    results = anew(results, conditions=(first, second, third))
    rows = main_table(results).rows
    assert rows[1][2] == "1.7170\ndiverged\n1.6900"
    assert rows[1][3] == "-0.0035\n(2 of 3)"  # (0.003 - 0.010) / 2
    text = Page(render_page(results)).visible
    assert "1 run diverged" in text
    # The diverged seed keeps its thin line but is in no mean.
    figure = plain(pictures.loss_curves(results))
    lines = [trace for trace in figure["data"] if trace["meta"]["condition"] == 1]
    assert len(lines) == 4
    assert lines[-1]["y"][-1] == pytest.approx((1.717 + 1.690) / 2 + 50 / 50 - 0.5)


def test_headline_claims_nothing_from_three_seeds() -> None:
    summary = summarise(study())
    assert summary.headline == (
        "No condition can be called better or worse than additive: 3 seeds are too few for intervals, which start at 5."
    )
    assert all(text.startswith("no interval from 3 seeds") for _, text in summary.verdicts)


def test_headline_names_what_separates_and_what_does_not() -> None:
    assert summarise(many_seeds(-0.05)).headline == (
        f"Lower loss than additive: {HOSTILE}. Not separated from it: write only."
    )
    assert summarise(many_seeds(+0.05)).headline.startswith(f"Higher loss than additive: {HOSTILE}.")
    null = summarise(many_seeds(0.0))
    assert null.headline.startswith("No condition separates from additive")
    assert all("differences beyond" in text for _, text in null.verdicts)


def test_the_answer_says_which_how_much_how_sure_and_at_what_cost() -> None:
    """The interval, the speed and the FLOPs are those of the results; without a word of what they do not hold."""
    assert summarise(bare()).answer == summarise(bare()).headline
    assert summarise(study()).answer == (
        f"{HOSTILE} ends 0.0043 nats per token below additive, the lowest mean of all others, but 3 seeds are too few "
        "to tell, at 0.86 times the speed and 1.10 times the FLOPs per token of additive."
    )
    results = many_seeds(-0.05)
    found = results.against_baseline()[0].comparison
    assert found.t_interval is not None
    reach = f"{-found.t_interval.high:.4f} to {-found.t_interval.low:.4f}"
    size = f"{-found.mean:.4f} nats per token (95 % interval {reach}, 6 seeds)"
    begins = f"{HOSTILE} has a lower loss than additive, by {size}"
    price = ", at 0.86 times the speed and 1.10 times the FLOPs per token of additive"
    assert summarise(results).answer == f"{begins}{price}."
    counted = anew(results, ngram=NGram(order=5, losses={0: 1.5, 1: 1.7}))
    own = sum(results.conditions[1].losses().values()) / 6
    assert summarise(counted).answer == f"{begins}{price}; counted 5-grams have 1.6000, {HOSTILE} {own:.4f}."
    for unclear in (many_seeds(0.0), many_seeds(0.05)):
        lead = "No condition is sure to have a lower loss than additive: the lowest, "
        assert summarise(unclear).answer.startswith(lead)
    named = anew(many_seeds(0.05), primary=Primary(condition=HOSTILE, refuted="it is above 0", stop="six seeds"))
    assert summarise(named).answer.startswith(f"{HOSTILE} has a higher loss than additive, by 0.0508 nats per token")
    named = anew(results, primary=Primary(condition="write only", refuted="it is above 0", stop="six seeds"))
    assert summarise(named).answer.startswith("write only and additive are not told apart: the difference is +")
    assert summarise(results).answer in Page(render_page(results)).visible


def test_a_page_of_a_hundred_runs_stays_small() -> None:
    """Ten conditions, ten seeds, twelve layers; each run with as many points as `collect` leaves, and validations."""
    points = tuple(
        CurvePoint(
            step=step, seconds=0.123456789 * step, train_loss=3 / (1 + step), validation_loss=2.123456 / (1 + step)
        )
        for step in range(60)
    )
    results = study({name: [1.7 + 0.0123456 * seed for seed in range(10)] for name in ("additive", *"bcdefghij")})
    conditions = [
        dataclasses.replace(
            one,
            runs=tuple(dataclasses.replace(own, curve=points) for own in one.runs),
            rewrites=tuple(rewrite(layer, sublayer) for layer in range(12) for sublayer in ("attention", "mlp")),
            control="b",
        )
        for one in results.conditions
    ]
    text = render_page(anew(results, conditions=tuple(conditions)))
    traces = [trace for figure in Page(text).data.values() for trace in figure["data"]]
    drawn = sum(sum(map(len, trace["z"])) if "z" in trace else len(trace["x"]) for trace in traces)
    assert 100 * 60 < drawn < 20_000 and len(text.encode()) < 1.5e6


def test_remarks_state_costs_and_gates() -> None:
    remarks = " ".join(summarise(study()).remarks)
    assert "between 0.71x (write only) and 0.86x" in remarks and "1.22x its peak memory (write only)" in remarks
    assert "1.25 in write only (sublayers 1.25 to 1.25)" in remarks


def test_page_of_a_study_without_results_says_so() -> None:
    page = Page(render_page(bare()))
    for sentence in (
        "Nothing to compare yet: no condition shares a finished seed with additive.",
        "What the conditions cost in speed and memory was not measured.",
        "What counted n-grams have on this text was not measured.",
        "No curves: results.json leaves them out.",
        "No gates: no condition has any, or its rewrites were not measured.",
        "No discrepancies: no condition has targets, or its rewrites were not measured.",
        "No norms of the state: these results come from runs whose rewrites were measured without them",
        "No samples: these results come from runs that kept none",
        "not run from a git checkout",
    ):
        assert sentence in page.visible
    assert page.data == {}


@pytest.mark.parametrize("self_contained", [False, True])
def test_page_loads_its_script_alone_and_runs_no_markup_of_a_name(self_contained: bool) -> None:
    text = render_page(study(), self_contained=self_contained)
    page = Page(text)
    assert page.loads == ([] if self_contained else ["script src=plotly.min.js"])
    assert page.policy.startswith("default-src 'none'")
    assert "connect-src" not in page.policy and "http" not in page.policy
    assert ("file:" in page.policy) == (len(text) < 1e6) == (not self_contained)
    assert not re.search(r"@import|url\(", text[: text.index("</style>")])
    assert "alert(1)</script>" not in text
    assert HOSTILE in page.visible
    assert "Does a delta rewrite <help>?" in page.visible and "What <b>1</b> is." in page.visible
    # In a picture plotly.js would read tags of its own markup: names arrive there as entities.
    assert "<script" not in json.dumps(page.data)


def test_page_holds_the_numbers_to_reproduce_it() -> None:
    results = study()
    text = Page(render_page(results)).visible
    for value in (
        results.command,
        "3f2c9c1e",
        "torch 2.13.0",
        "processor: a CPU & more",
        "0, 1, 2",
        results.corpus.sha256,
        results.validation.contexts,
        "131,072 tokens",
        "40 steps × 2,048 tokens = 81.9 k tokens per run of additive, the others at equal tokens; 1 thread per run",
        results.started,
    ):
        assert value in text
    rewrites = Page(render_page(results)).rows["rewrites"]
    assert rewrites[1] == [HOSTILE, "0", "attention", "1.25", "0.75", "0.125", "1", "0.0625"]
    assert len(rewrites) == 1 + 2 * 4


def test_results_survive_the_file(tmp_path: Path) -> None:
    results = many_seeds()
    results.save(tmp_path / "results.json")
    # All but the curves, which the records of the runs hold.
    assert any(run.curve for run in results.conditions[0].runs)
    assert load_results(tmp_path / "results.json") == without_curves(results)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_files_that_hold_no_results_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with pytest.raises(UserError, match="no such file"):
        load_results(file)
    for text, message in (
        ("{", "must hold a JSON object, but is damaged"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "has format 1, and this version reads 2: it does not say which version wrote it"),
        ('{"format": 3, "versions": {"deepdelta": "0.2.0"}}', "has format 3.*reads 2: read it with deepdelta 0.2.0"),
        ('{"versions": {"deepdelta": "0.1.0"}, "commit": "abc"}', "with deepdelta 0.1.0 at commit abc"),
        ('{"format": 2}', "command: Field required"),
        ('{"format": 2, "nam": 1}', "did you mean"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_results(file)
    data = to_plain(study())
    data["conditions"][0]["runs"][0]["seed"] = "zero"
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"conditions\.0\.runs\.0\.seed"):
        load_results(file)


def test_contradictory_results_are_refused() -> None:
    results = study()
    with pytest.raises(UserError, match="baseline must be one of"):
        anew(results, baseline="adidtive")
    with pytest.raises(UserError, match="different names"):
        anew(results, conditions=(results.conditions[0],) * 2)
    with pytest.raises(UserError, match="different seeds"):
        dataclasses.replace(results.conditions[0], runs=(run(0, 1.0), run(0, 1.1)))
    with pytest.raises(UserError, match="seeds of the study"):
        anew(results, seeds=(0, 1))
    with pytest.raises(UserError, match="must be finite"):
        run(0, math.nan)
    with pytest.raises(UserError, match="gate_histogram"):
        RewriteSummary(layer=0, sublayer="mlp", gate_histogram=(1, 2))


def test_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "report.html"
    write_report(bare(), path, self_contained=True)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    write_report(study(), path)
    assert path.read_text(encoding="utf-8") == render_page(study())
    script = path.with_name("plotly.min.js")
    assert sorted(path.parent.iterdir()) == [path.with_name("operator.html"), script, path]
    assert '<a href="operator.html">' in render_page(study())
    assert script.read_text(encoding="utf-8") in render_page(study(), self_contained=True)
    script.write_text("older", encoding="utf-8")
    write_report(study(), path)
    assert script.stat().st_size > 1e6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12.0, "12"),
        (999.4, "999"),
        (999.6, "1.00 k"),
        (805_000, "805 k"),
        (4.9e6, "4.90 M"),
        (9.996e6, "10.0 M"),
        (99.96e6, "100 M"),
        (999_600_000, "1.00 G"),
        (1.23e12, "1.23 T"),
    ],
)
def test_metric_prefixes(value: float | int, text: str) -> None:
    assert si(value) == text


def test_without_plotly_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['plotly'] = None\n"
        "from deepdelta.errors import UserError\n"
        "from deepdelta.lab.views.drawing import figure\n"
        "try: figure(1, 'x')\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "extra 'lab'" in done.stdout and "plotly" in done.stdout


def test_a_narrow_terminal_keeps_names_and_intervals_whole() -> None:
    results = load_results(Path(__file__).parents[1] / "results" / "headline" / "results.json")
    console = Console(file=StringIO(), width=80, color_system=None)
    console.print(render_study(results, 80))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    for condition in results.conditions:
        (row,) = (line for line in lines if line.split()[:1] == [condition.name])
        assert f"{sum(condition.losses().values()) / len(condition.losses()):.4f}" in row
    assert any(line.split() == ["to", "-0.1434"] for line in lines)

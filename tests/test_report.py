"""The table in its three forms, the sentences, the pictures and the page: equal numbers, nothing loaded, no markup."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from rich.console import Console

from deepdelta.config import to_plain
from deepdelta.errors import UserError
from deepdelta.report import figures as pictures
from deepdelta.report import markdown_table, render_table, summarise, write_report
from deepdelta.report.page import render_page
from deepdelta.report.table import si, table_cells
from deepdelta.studies.results import (
    GATE_BINS,
    Budget,
    ConditionResult,
    Corpus,
    CostResult,
    CurvePoint,
    RewriteSummary,
    RunResult,
    StudyResults,
    Validation,
    load_results,
    save_results,
)
from deepdelta.studies.statistics import compare, paired

HOSTILE = "delta </script><script>alert(1)</script> | [x](y) `V=4` & *co*"
# Losses of three seeds, from the first measurements: their differences overlap zero.
LOSSES = {"additive": [1.714, 1.658, 1.70], HOSTILE: [1.717, 1.652, 1.69], "write only": [1.664, 1.716, 1.71]}


def run(seed: int, loss: float | None, late: float = 0.0) -> RunResult:
    end = 1.7 if loss is None else loss
    curve = tuple(
        CurvePoint(
            step=step, seconds=0.1 * step + late, train_loss=end + 0.2, validation_loss=end + 50 / (step + 10) - 0.5
        )
        for step in (0, 10, 20, 30, 40)
    )
    return RunResult(seed=seed, validation_loss=loss, seconds=4.0, curve=curve)


def rewrite(layer: int, sublayer: str) -> RewriteSummary:
    return RewriteSummary(
        layer=layer,
        sublayer=sublayer,
        gate_histogram=tuple(range(GATE_BINS)),
        gate_mean=1.25,
        discrepancy_before=0.75,
        discrepancy_after=0.125,
        direction_norm=1.0,
        cosine=0.0625,
    )


def condition(name: str, losses: list[float], number: int) -> ConditionResult:
    return ConditionResult(
        name=name,
        summary=f"What <b>{number}</b> is.",
        rule="additive" if number == 0 else "delta" if number == 1 else "write_only",
        value_channels=4 if number else 1,
        parameters=805_000 + number,
        flops_per_token=4.9e6 * (1 + number / 10),
        cost=CostResult(
            tokens_per_second=24_000.0,
            speed_ratio=1 - number / 7,
            speed_ratio_low=0.97 - number / 7,
            speed_ratio_high=1.02 - number / 7,
            rounds=7,
            peak_bytes=200_000_000,
            peak_ratio=1 + number / 9,
        ),
        runs=tuple(run(seed, loss) for seed, loss in enumerate(losses)),
        rewrites=tuple(rewrite(layer, sublayer) for layer in (0, 1) for sublayer in ("attention", "mlp") if number),
    )


def study(losses: dict[str, list[float]] = LOSSES) -> StudyResults:
    return StudyResults(
        name="quick",
        description="Does a delta rewrite <help>?",
        baseline="additive",
        command="deepdelta study quick",
        commit="3f2c9c1e",
        versions={"deepdelta": "0.1.0", "torch": "2.13.0", "numpy": "2.3.1", "python": "3.11.9"},
        machine={"processor": "a CPU & more", "cores": "2"},
        started="2026-07-30T10:00:12+00:00",
        finished="2026-07-30T10:08:41+00:00",
        corpus=Corpus(description="the standard library", sha256="9c5e1f0a" * 8),
        validation=Validation(tokens=131_072, contexts="Contexts of 256 tokens do not overlap."),
        budget=Budget(steps=40, tokens_per_step=2048, threads_per_run=1),
        seeds=tuple(range(max(map(len, losses.values())))),
        conditions=tuple(condition(name, values, number) for number, (name, values) in enumerate(losses.items())),
    )


def many_seeds(shift: float = -0.05) -> StudyResults:
    base = [1.70, 1.66, 1.71, 1.68, 1.72, 1.69]
    jitter = [0.004, -0.006, 0.001, 0.003, -0.002, 0.005]
    better = [loss + shift + noise for loss, noise in zip(base, jitter, strict=True)]
    same = [loss + noise for loss, noise in zip(base, jitter[::-1], strict=True)]
    return study({"additive": base, HOSTILE: better, "write only": same})


def bare() -> StudyResults:
    """Nothing but the plan: no finished run, no costs, no rewrites."""
    results = study()
    empty = [dataclasses.replace(c, cost=None, runs=(), rewrites=()) for c in results.conditions]
    return dataclasses.replace(results, conditions=tuple(empty), commit=None, finished=None)


class Page(HTMLParser):
    """The page as a browser's parser sees it: text, tables, data, and whatever an element would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.data: dict[str, Any] = {}
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.policy = ""
        self._table = self._cell = self._script = ""
        self._plot: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [
            f"{tag} {key}={values[key]}" for key in ("src", "href", "srcset", "data", "action") if key in values
        ]
        self.ids += [values["id"] or ""] if "id" in values else []
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        if tag == "table":
            self._table = values["id"] or ""
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self.rows[self._table][-1].append("")
            self._cell = tag
        elif tag in ("script", "style"):
            self._script = tag
            self._plot = values.get("data-plot")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._cell:
            self._cell = ""
        if tag == self._script:
            self._script = ""

    def handle_data(self, data: str) -> None:
        if self._script:
            if self._plot is not None:
                self.data[self._plot] = json.loads(data)
            return
        self.text.append(data)
        if self._cell:
            self.rows[self._table][-1][-1] += data

    @property
    def visible(self) -> str:
        return " ".join(" ".join(self.text).split())


def flat(rows: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in rows]


def markdown_rows(text: str) -> list[list[str]]:
    """Cells of a Markdown table, its escapes undone."""
    rows = []
    for line in text.splitlines():
        if line.startswith("|") and "---" not in line:
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            plain = (re.sub(r"\\([\\|*_`\[\]])", r"\1", cell.strip()) for cell in cells)
            rows.append([cell.replace("&lt;", "<").replace("&amp;", "&") for cell in plain])
    return rows


@pytest.mark.parametrize("results", [study(), many_seeds(), bare()], ids=["three seeds", "six seeds", "bare"])
def test_three_forms_show_the_same_cells(results: StudyResults) -> None:
    cells = table_cells(results)
    expected = [[" ".join(column.title.split()) for column in cells.columns], *flat(cells.rows)]
    assert markdown_rows(markdown_table(results)) == expected
    page = Page(render_page(results))
    assert [[" ".join(cell.split()) for cell in row] for row in page.rows["results"]] == expected
    # The terminal, wide and too narrow, loses no character of any cell.
    for width in (200, 60):
        console = Console(file=StringIO(), width=width, color_system=None)
        console.print(render_table(results))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in shown
        if width == 200:
            assert all(line in shown for row in cells.rows for cell in row for line in cell.split("\n"))


def test_cells_are_the_numbers_of_the_study() -> None:
    cells = table_cells(study())
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
    cells = table_cells(results)
    row = dict(zip((column.title for column in cells.columns), cells.rows[1], strict=True))
    comparison = compare(results)[HOSTILE]
    assert comparison.t_interval is not None and comparison.p_value is not None
    assert row["95 %\ninterval"] == f"{comparison.t_interval.low:+.4f}\nto {comparison.t_interval.high:+.4f}"
    # Two comparisons: the smaller p-value doubles.
    assert comparison.adjusted_p == pytest.approx(2 * comparison.p_value)
    assert row["p\n(Holm)"] == f"{2 * comparison.p_value:.2g}"


def test_diverged_and_unfinished_runs_are_shown_and_left_out_of_means() -> None:
    results = study()
    first, second, third = results.conditions
    second = dataclasses.replace(second, runs=(second.runs[0], run(1, None), second.runs[2]))
    third = dataclasses.replace(third, runs=third.runs[:2])
    results = dataclasses.replace(results, conditions=(first, second, third))
    rows = table_cells(results).rows
    assert rows[1][2] == "1.7170\ndiverged\n1.6900"
    assert rows[1][3] == "-0.0035\n(2 of 3)"  # (0.003 - 0.010) / 2
    assert rows[2][2] == "1.6640\n1.7160\n-"
    text = Page(render_page(results)).visible
    assert "8 of 9 runs ended so far; this report is provisional." in text
    assert "1 run diverged" in text
    # The diverged seed keeps its thin line but is in no mean.
    figure = pictures.loss_curves(results, pictures.axes(results)[0])
    assert figure is not None
    lines = [trace for trace in figure["data"] if trace["meta"] == 1]
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


def test_remarks_state_costs_and_gates() -> None:
    remarks = " ".join(summarise(study()).remarks)
    assert "between 0.71x (write only) and 0.86x" in remarks and "1.22x its peak memory (write only)" in remarks
    assert "1.25 in write only (sublayers 1.25 to 1.25)" in remarks


def test_page_of_a_study_without_results_says_so() -> None:
    page = Page(render_page(bare()))
    for sentence in (
        "Nothing to compare yet: no condition shares a finished seed with additive.",
        "0 of 9 runs ended so far; this report is provisional.",
        "What the conditions cost in speed and memory was not measured.",
        "No losses during training were recorded.",
        "No gates were recorded.",
        "No discrepancies were recorded.",
        "not run from a git checkout",
    ):
        assert sentence in page.visible
    assert page.data == {}


def test_page_loads_nothing_and_runs_no_markup_of_a_name() -> None:
    text = render_page(study())
    page = Page(text)
    assert page.loads == []
    assert page.policy.startswith("default-src 'none'")
    assert "connect-src" not in page.policy and "http" not in page.policy
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
        "40 steps × 2,048 tokens = 81.9 k tokens per run, 1 thread per run",
        results.started,
    ):
        assert value in text
    rewrites = Page(render_page(results)).rows["rewrites"]
    assert rewrites[1] == [HOSTILE, "0", "attention", "1.25", "0.75", "0.125", "1", "0.0625"]
    assert len(rewrites) == 1 + 2 * 4


def test_pictures_are_valid_and_each_has_its_place() -> None:
    page = Page(render_page(many_seeds()))
    assert set(page.data) <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    assert {"difference", "steps", "flops", "seconds", "gates-1", "gates-2", "discrepancy-1"} <= set(page.data)
    for figure in page.data.values():
        go.Figure(figure)  # raises on any property that plotly.js does not know


def test_differences_show_every_seed_the_mean_and_the_interval() -> None:
    results = many_seeds()
    comparison = compare(results)[HOSTILE]
    figure = pictures.differences(results)
    assert figure is not None and comparison.t_interval is not None
    dots, mean = figure["data"][:2]
    base, better = results.conditions[0].losses(), results.conditions[1].losses()
    assert dots["x"] == [better[seed] - base[seed] for seed in results.seeds]
    assert mean["x"] == [comparison.mean]
    spans = {(shape["x0"], shape["x1"]) for shape in figure["layout"]["shapes"]}
    assert (comparison.t_interval.low, comparison.t_interval.high) in spans
    assert comparison.smallest_resolvable is not None
    assert (-comparison.smallest_resolvable, comparison.smallest_resolvable) in spans


def test_loss_curves_lie_on_steps_flops_and_seconds() -> None:
    results = study()
    slow = dataclasses.replace(results.conditions[1], runs=tuple(run(seed, 1.7, late=float(seed)) for seed in range(3)))
    results = dataclasses.replace(results, conditions=(results.conditions[0], slow))
    expected = {
        "steps": [0, 10, 20, 30, 40],
        "flops": [step * 2048 * 4.9e6 * 1.1 for step in (0, 10, 20, 30, 40)],
        "seconds": [1.0, 2.0, 3.0, 4.0, 5.0],  # seeds start 0, 1 and 2 seconds late: 1 on average
    }
    for axis in pictures.axes(results):
        figure = pictures.loss_curves(results, axis)
        assert figure is not None
        mean = figure["data"][-1]
        assert mean["x"] == pytest.approx(expected[axis.key])
        assert mean["y"] == pytest.approx([1.7 + 50 / (step + 10) - 0.5 for step in (0, 10, 20, 30, 40)])
        # The start, five times as high, does not set the range.
        assert figure["layout"]["yaxis"]["range"][1] < 3.5


def test_curves_fall_back_to_training_loss_and_say_so() -> None:
    results = study()
    conditions = [
        dataclasses.replace(
            c,
            runs=tuple(
                dataclasses.replace(r, curve=tuple(dataclasses.replace(p, validation_loss=None) for p in r.curve))
                for r in c.runs
            ),
        )
        for c in results.conditions
    ]
    results = dataclasses.replace(results, conditions=tuple(conditions))
    assert pictures.measured_loss(results) == "train"
    page = Page(render_page(results))
    assert page.data["steps"]["layout"]["yaxis"]["title"]["text"] == "training loss (nats)"
    assert "Training loss falls" in page.visible


def test_gate_heatmap_holds_shares_over_zero_to_two() -> None:
    results = study()
    figure = pictures.gate_heatmap(results, results.conditions[1])
    assert figure is not None
    heat, means = figure["data"]
    assert heat["z"][0] == pytest.approx([count / 190 for count in range(20)])
    assert heat["x0"] - heat["dx"] / 2 == 0 and heat["x0"] + heat["dx"] * (GATE_BINS - 0.5) == pytest.approx(2)
    assert heat["zmax"] == pytest.approx(19 / 190)
    assert means["x"] == [1.25] * 4
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [0, 1, 2]
    assert pictures.gate_heatmap(results, results.conditions[0]) is None
    empty = dataclasses.replace(
        results.conditions[1],
        rewrites=(RewriteSummary(layer=0, sublayer="mlp", gate_histogram=(0,) * GATE_BINS, gate_mean=None),),
    )
    assert pictures.gate_heatmap(results, empty)["data"][0]["z"] == [[0.0] * GATE_BINS]  # type: ignore[index]


def test_discrepancies_join_before_and_after() -> None:
    results = study()
    figure = pictures.discrepancies(results, results.conditions[1])
    assert figure is not None
    line, before, after = figure["data"]
    assert line["x"][:3] == [0.75, 0.125, None]
    assert (before["x"], after["x"]) == ([0.75] * 4, [0.125] * 4)
    assert before["y"] == ["0 attention", "0 mlp", "1 attention", "1 mlp"]
    assert pictures.discrepancies(results, results.conditions[0]) is None


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_can_be_seen_on_light_and_dark_and_looks_do_not_repeat() -> None:
    style = (Path(pictures.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    cards = re.findall(r"--card: (#[0-9a-f]{6})", style)
    assert len(cards) == 2
    for colour in (pictures.BASELINE_COLOUR, *pictures.COLOURS):
        for card in cards:
            dark, light = sorted((luminance(colour), luminance(card)))
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, card)
    results = study({"additive": [1.7], **{f"c{number}": [1.7] for number in range(40)}})
    assert len({(look.colour, look.dash) for look in pictures.looks(results).values()}) == 41


def test_results_survive_the_file(tmp_path: Path) -> None:
    results = many_seeds()
    save_results(results, tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_files_that_hold_no_results_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with pytest.raises(UserError, match="no such file"):
        load_results(file)
    for text, message in (("{", "not JSON"), ("[]", "no JSON object"), ("{}", "name"), ('{"nam": 1}', "did you mean")):
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
        dataclasses.replace(results, baseline="adidtive")
    with pytest.raises(UserError, match="different names"):
        dataclasses.replace(results, conditions=(results.conditions[0],) * 2)
    with pytest.raises(UserError, match="different seeds"):
        dataclasses.replace(results.conditions[0], runs=(run(0, 1.0), run(0, 1.1)))
    with pytest.raises(UserError, match="seeds of the study"):
        dataclasses.replace(results, seeds=(0, 1))
    with pytest.raises(UserError, match="must be finite"):
        run(0, math.nan)
    with pytest.raises(UserError, match="gate_histogram"):
        RewriteSummary(layer=0, sublayer="mlp", gate_histogram=(1, 2))


def test_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "report.html"
    write_report(bare(), path)
    write_report(study(), path)
    assert path.read_text(encoding="utf-8") == render_page(study())
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


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
        "from deepdelta.report.page import render_page\n"
        "try: render_page(None)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "extra 'study'" in done.stdout and "plotly" in done.stdout

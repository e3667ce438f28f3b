"""Results of studies to report on: three seeds, six, none; with a name full of markup; and a reader of pages."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from typing import Any

from deepdelta.lab.analysis.comparisons import analyse
from deepdelta.lab.analysis.results import (
    Budget,
    ConditionResult,
    Corpus,
    CurvePoint,
    Measurements,
    RewriteSummary,
    RunResult,
    Sample,
    StudyResults,
    Validation,
)
from deepdelta.lab.measure.cost import Cost
from deepdelta.lab.measure.rewrites import GATE_BINS

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
        state_norm=2.5,
    )


def condition(name: str, losses: list[float], number: int) -> ConditionResult:
    return ConditionResult(
        name=name,
        summary=f"What <b>{number}</b> is.",
        rule="additive" if number == 0 else "delta" if number == 1 else "write_only",
        value_channels=4 if number else 1,
        parameters=805_000 + number,
        flops_per_token=4.9e6 * (1 + number / 10),
        cost=Cost(
            tokens_per_second=24_000.0,
            speed_ratio=1 - number / 7,
            speed_ratio_low=0.97 - number / 7,
            speed_ratio_high=1.02 - number / 7,
            rounds=7,
            peak_bytes=200_000_000,
            peak_ratio=1 + number / 9,
            moved_bytes=250_000.0 + number,
        ),
        runs=tuple(run(seed, loss) for seed, loss in enumerate(losses)),
        rewrites=tuple(rewrite(layer, sublayer) for layer in (0, 1) for sublayer in ("attention", "mlp") if number),
        sample=Sample(prompt="def <b>", text=f"{name} & more"),
    )


def study(losses: dict[str, list[float]] = LOSSES) -> StudyResults:
    measured = Measurements(
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
    return analyse(measured)


def anew(results: StudyResults, **changes: Any) -> StudyResults:
    """The study with something else measured, analysed again."""
    measured = {field.name: getattr(results, field.name) for field in dataclasses.fields(Measurements)}
    return analyse(Measurements(**(measured | changes)))


def many_seeds(shift: float = -0.05) -> StudyResults:
    base = [1.70, 1.66, 1.71, 1.68, 1.72, 1.69]
    jitter = [0.004, -0.006, 0.001, 0.003, -0.002, 0.005]
    better = [loss + shift + noise for loss, noise in zip(base, jitter, strict=True)]
    same = [loss + noise for loss, noise in zip(base, jitter[::-1], strict=True)]
    return study({"additive": base, HOSTILE: better, "write only": same})


def bare() -> StudyResults:
    """Nothing but the plan: no finished run, no costs, no rewrites."""
    results = study()
    empty = [dataclasses.replace(c, cost=None, runs=(), rewrites=(), sample=None) for c in results.conditions]
    return anew(results, conditions=tuple(empty), commit=None, finished="2026-01-01T00:00:00+00:00")


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
            f"{tag} {key}={values[key]}"
            for key in ("src", "href", "srcset", "data", "action")
            if key in values and (tag, values[key]) != ("a", "operator.html")  # a link beside it, which loads nothing
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


def plain(figure: Any) -> Any:
    """A figure of plotly as plain data."""
    return json.loads(figure.to_json())


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

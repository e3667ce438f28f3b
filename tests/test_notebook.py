"""What objects show in a notebook: their own numbers, every text escaped, plain text elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from deepdelta import DeltaOperator, DeltaStream, load, notebook
from deepdelta.training import RunDirectory
from report_samples import HOSTILE, bare, many_seeds
from tiny_runs import config, quietly, text_file


class Cells(HTMLParser):
    """The cells of a table, by the first of their row; and what would run or load."""

    def __init__(self, object_: Any) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.text = object_._repr_html_()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name in ("src", "href", "onload") for name, _ in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def __getitem__(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)


def centres(text: str) -> list[complex]:
    return [complex(float(x), -float(y)) for x, y in re.findall(r'<circle cx="([-.\d]+)" cy="([-.\d]+)"', text)]


@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 2)])
def test_an_operator_shows_its_spectrum(batch: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(*batch, 5, generator=draw, dtype=torch.float64), dim=-1)
    one = DeltaOperator(k, torch.full(batch, 1.5, dtype=torch.float64))
    other = DeltaOperator(k.roll(1, -1), torch.full(batch, 2.0, dtype=torch.float64))
    for operator in (one, DeltaOperator.compose([one, other])):
        cells = Cells(operator)
        assert cells["width"] == ["5"] and cells["batch"] == [str(batch)]
        if 0 in batch:
            continue
        directions = operator.K.shape[-1]
        values = sorted(operator.eigenvalues()[..., -directions:].flatten().tolist(), key=lambda z: (z.real, z.imag))
        scale = 100 / (1.1 * max(1.0, *map(abs, values)))
        assert sorted(centres(cells.text), key=lambda z: (z.real, z.imag)) == [
            pytest.approx(value * scale, abs=0.1) for value in values
        ]
        assert float(cells["determinant"][0].split(" to ")[0]) == pytest.approx(
            operator.determinant().min().item(), 1e-3
        )
    assert Cells(one).rows[3:4] == ([["it does", "over-relaxed"]] if 0 not in batch else [])
    assert repr(one) == f"DeltaOperator(dim=5, directions=1, batch={batch}, dtype=torch.float64)"
    nothing = DeltaOperator(torch.full((2,), torch.nan), torch.tensor(1.0))
    assert Cells(nothing).tags == {"table", "caption", "tbody", "tr", "th", "td"}


def test_a_stream_shows_what_is_not_by_default() -> None:
    cells = Cells(DeltaStream(12, 2, rule="write_only", gate_init=0.25))
    assert (cells["dim"], cells["value_channels"], cells["rule"], cells["gate_init"]) == (
        ["12"],
        ["2"],
        ["write_only"],
        ["0.25"],
    )


def test_a_run_shows_its_loss_and_its_path_as_text(tmp_path: Path) -> None:
    run = tmp_path / "<b>run & co"
    assert Cells(RunDirectory(run))["path"] == [str(run)]
    settings = config(text_file(tmp_path / "text.txt"), backend="reference")
    quietly(settings, run)
    cells, losses = Cells(RunDirectory(run)), [row["loss"] for row in RunDirectory(run).metrics() if "loss" in row]
    assert cells["path"] == [str(run)] and cells["steps"] == [f"{settings.steps} of {settings.steps}"]
    drawing = ElementTree.fromstring(re.search("<svg.*</svg>", cells.text)[0])  # type: ignore[index]
    path = drawing.findall("path")[1].get("d")
    heights = [float(one.split()[1]) for one in path[1:].split("L")]  # type: ignore[index]
    assert heights == pytest.approx(
        [8 + 110 * (max(losses) - y) / (max(losses) - min(losses)) for y in losses], abs=0.1
    )
    loaded = load(run)
    assert Cells(loaded)["parameters"] == [f"{sum(p.numel() for p in loaded.model.parameters()):,}"]


def test_results_show_every_condition_with_its_interval() -> None:
    results = many_seeds()
    cells = Cells(results)
    found = results.against_baseline()[0].comparison
    assert found.t_interval is not None
    low, high = found.t_interval.low, found.t_interval.high
    assert cells[HOSTILE][1:] == [f"{found.mean:+.4f}", f"{low:+.4f} to {high:+.4f}"] and "script" not in cells.tags
    assert len(centres(cells.text)) == 2 and cells["additive"][1:] == ["-", "-"]
    assert "svg" not in Cells(bare()).tags


def test_a_curve_leaves_out_what_is_not_finite() -> None:
    assert notebook.curve([(1.0, 2.0), (2.0, float("nan"))], "x") == ""
    assert "nan" not in notebook.curve([(1.0, 2.0), (2.0, float("nan")), (3.0, 2.0)], "x")

"""`deepdelta bench gradients`: the errors on numbers known by hand, and a measurement at a reduced size."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta import UserError
from deepdelta.cli import main
from deepdelta.lab.bench import gradients, suites
from deepdelta.lab.bench.gradients import SMALL, Trial, measured, relative, run_gradients

TINY = replace(SMALL, cases=("paper-cc",), layers=3, tokens=9, starts=("moved",))


def test_the_error_of_all_gradients_is_that_of_one_vector() -> None:
    truth = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    ours = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([[4.4]]).bfloat16()}
    off = float(ours["b"].double()) - 4
    assert relative(ours, truth) == pytest.approx(((0.3**2 + off**2) / 25) ** 0.5, rel=1e-6)
    assert relative(truth, truth) == 0
    nothing = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
    assert relative(nothing, nothing) == 0 and relative(truth, nothing) == math.inf
    assert relative(truth | {"b": torch.tensor([math.nan])}, truth | {"b": torch.ones(1)}) == math.inf


def test_the_suite_is_what_it_says() -> None:
    assert (gradients.DEEP.layers, gradients.DEEP.dim, len(gradients.DEEP.seeds)) == (48, 64, 3)
    assert gradients.DEEP.precisions == ("fp32", "bf16", "bf16 weights")
    assert gradients.DEEP.plans == ("save", "replay", "recover")
    assert gradients.DEEP.backends == ("reference", "fused")


def test_errors_are_those_of_the_precision_and_replay_adds_none(unchecked: None) -> None:
    rows = {(row.precision, row.backend, row.plan): row for row in measured(TINY)}
    assert list(rows) == list(product(TINY.precisions, TINY.backends, TINY.plans))
    for (precision, _, plan), row in rows.items():
        least, most = (1e-8, 1e-4) if precision == "fp32" else (1e-3, 0.5)
        assert least < row.whole[0] < most and row.whole[0] < row.largest[0], row
        assert row.as_saved or plan == "recover", row
    exact = rows["fp32", "reference", "save"].whole[0]
    assert exact / 10 < rows["fp32", "fused", "recover"].whole[0] < 10 * exact
    assert not rows["fp32", "fused", "recover"].as_saved


def test_a_wrong_backward_pass_and_a_wrong_replay_are_seen(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """A gradient of h that is a hundredth too large, and a state that is made again otherwise than it was."""
    from deepdelta.nn import rewriting
    from deepdelta.ops.backends.cpu import launch

    trial = replace(TINY, precisions=("fp32",), plans=("save", "replay"))
    right = {(row.backend, row.plan): row for row in measured(trial)}
    plain, remake = launch.backward, rewriting.remake

    def wrong(*given: Any) -> Any:
        gradients = plain(*given)
        gradients.d_h.mul_(1.01)
        return gradients

    with monkeypatch.context() as patched:
        patched.setattr(launch, "backward", wrong)
        row = {(row.backend, row.plan): row for row in measured(trial)}
    assert row["fused", "save"].whole[0] > 1e-3 > 30 * right["fused", "save"].whole[0]
    assert row["reference", "save"] == right["reference", "save"]

    def other(done: Any, state: Tensor, **how: bool) -> Tensor:
        return remake(done, state, **how) * (1 + 1e-6)

    monkeypatch.setattr(rewriting, "remake", other)
    row = {(row.backend, row.plan): row for row in measured(trial)}
    assert not row["fused", "replay"].as_saved and row["reference", "replay"].as_saved
    assert row["fused", "save"] == right["fused", "save"]


@pytest.mark.usefixtures("unchecked")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(gradients, "SMALL", replace(TINY, starts=("initial", "moved"), precisions=("fp32",)))
    threads = torch.get_num_threads()
    main(["bench", "gradients", "--quick", "--threads", "1"])
    assert torch.get_num_threads() == threads
    out = tmp_path / "runs" / "bench-gradients"
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "table.md"]
    found = json.loads((out / "results.json").read_text())
    assert found["command"] and found["quick"] and found["threads"] == 1 and found["trial"]["layers"] == 3
    assert {"torch", "numba", "deepdelta"} <= set(found["versions"]) and found["machine"]["cores"]
    assert len(found["rows"]) == 2 * 6
    table = (out / "table.md").read_text()
    assert "QUICK RUN" in table and table.count("| paper-cc, fused | fp32 | replay |") == 2
    printed = capsys.readouterr().out
    assert "As training starts" in printed and max(map(len, printed.splitlines())) <= 80


def test_what_cannot_be_measured_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "gradients", "--rounds", "3"])
    assert "gradients measures no times, so it has no rounds" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean 'gradients'"):
        suites.load_suite("gradient")
    with pytest.raises(UserError, match="threads must be at least 1, got 0"):
        run_gradients(tmp_path / "out", threads=0, command="")
    monkeypatch.setattr(gradients, "fused_problem", lambda *_: "numba is absent")
    with pytest.raises(UserError, match="numba is absent; it is what `deepdelta bench gradients` measures"):
        run_gradients(tmp_path / "out", trial=Trial(), command="")
    assert not (tmp_path / "out").exists()

"""What a study would take, said before it runs: counted by hand, nothing made, nothing written."""

import dataclasses
import re
from pathlib import Path

import pytest

from deepdelta import UserError
from deepdelta.cli import main
from deepdelta.lab.experiments.config import load_study
from deepdelta.lab.preview import _hours, preview
from deepdelta.lab.runner import run
from deepdelta.models import parameter_count
from deepdelta.models.flops import training_flops_per_token
from deepdelta.planning import gpu_named, outlook
from deepdelta.training import TrainConfig
from tiny_runs import RUNS, text_file, trained_here

pytestmark = pytest.mark.usefixtures("unchecked")

STUDY = """
name = "tiny"
question = "Does it help?"
baseline = "plain"
seeds = [0, 1, 2]
BUDGETS

[train]
steps = 40
RUNS

[conditions.plain]
summary = "x + F(x)"
changes.model.residual = { rule = "additive" }

[conditions.delta]
summary = "the delta rule"
changes.model.residual = { rule = "delta", value_channels = 2 }
"""
TUNE = "[tune]\nlr = [1e-3, 2e-3]\nseeds = [7]\nsteps = 10\n"
SIZES = "[sizes.short]\nsteps = 20\n[sizes.long]\nsteps = 60\n[extrapolate]\nflops = 1e12\n"
SEARCH = """
[search]
rungs = [{ steps = 20, seeds = [8, 9], keep = 2 }, { steps = 40, seeds = [8], keep = 1 }]

[conditions.write]
summary = "writes alone"
changes.model.residual = { rule = "write_only", value_channels = 2 }

[conditions.erase]
summary = "erases alone"
changes.model.residual = { rule = "erase_only", value_channels = 2 }
"""


def written(folder: Path, extra: str = "", budgets: str = "") -> str:
    runs = RUNS.replace("SOURCE", str(text_file(folder / "text.txt")))
    if "[tune]" in extra:
        runs = runs.replace("lr = 2e-3\n", "")
    text = (
        STUDY.replace("RUNS", runs)
        .replace("BUDGETS", budgets)
        .replace("[conditions.plain]", f"{extra}\n[conditions.plain]")
    )
    (folder / "tiny.toml").write_text(text)
    return str(folder / "tiny.toml")


def rows(file: str, out: Path, gpu: str | None = None) -> dict[str, dict[str, str]]:
    table = preview(load_study(file), out, None if gpu is None else gpu_named(gpu))
    titles = [column.title for column in table.columns]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in table.rows}


def config(file: str, condition: str) -> TrainConfig:
    made = load_study(file).train_config(condition, 0)
    return dataclasses.replace(made, model=dataclasses.replace(made.model, vocab_size=256))


@pytest.mark.parametrize("budgets", ["", "budgets = ['flops']", "budgets = ['flops', 'time']"])
def test_runs_tokens_and_flops_are_those_that_the_study_would_make(tmp_path: Path, budgets: str) -> None:
    file = written(tmp_path, TUNE, budgets)
    found = rows(file, tmp_path / "out", "h100")
    per_token = {name: training_flops_per_token(config(file, name).model).training for name in ("plain", "delta")}
    steps = 40 if not budgets else round(40 * per_token["plain"] / per_token["delta"])
    for name, own in (("plain", 40), ("delta", steps)):
        tokens = (3 * own + 2 * 10) * 2 * 16
        assert found[name]["runs"] == "5" and found[name]["recorded"] == "0"
        assert found[name]["tokens"] == f"{tokens / 1e6:,.2f} M"
        trained = 0.9 * (tmp_path / "text.txt").stat().st_size
        assert float(found[name]["epochs"]) == pytest.approx(own * 32 / trained, rel=0.05)
        assert found[name]["FLOPs"] == f"{tokens * per_token[name]:.3g}"
        assert found[name]["parameters"] == f"{parameter_count(config(file, name).model):,}"
        speed = outlook(config(file, name), gpu_named("h100"), 1).tokens_per_second
        assert found[name]["GPU hours"] == "< 0.01" and tokens / speed < 36
    assert not (tmp_path / "out").exists()


def test_what_has_a_record_is_counted_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = written(tmp_path), tmp_path / "out"
    trained_here(monkeypatch)
    study = load_study(file, {"seeds": [1], "rewrite_tokens": 16, "cost_rounds": 1})
    run(study, out, command="")
    found = rows(file, out)
    assert (found["plain"]["recorded"], found["delta"]["recorded"], found["plain"]["runs"]) == ("1", "1", "3")
    assert "GPU hours" not in found["plain"]
    # At another rate, as if it had been tuned, it counts; of another length it is in the way, as it would be of a run.
    (tmp_path / "tiny.toml").write_text(Path(file).read_text().replace("lr = 2e-3", "lr = 5e-3"))
    assert rows(file, out)["plain"]["recorded"] == "1"
    (tmp_path / "tiny.toml").write_text(Path(file).read_text().replace("steps = 40", "steps = 41"))
    with pytest.raises(UserError, match=r"already holds this study with other settings of plain \(steps: 40 there"):
        rows(file, out)
    (tmp_path / "tiny.toml").write_text(Path(file).read_text().replace('name = "tiny"', 'name = "other"'))
    with pytest.raises(UserError, match="already holds the study 'tiny'"):
        rows(file, out)


def test_of_equal_time_alone_only_the_baseline_is_known(tmp_path: Path) -> None:
    found = rows(written(tmp_path, budgets="budgets = ['time']"), tmp_path / "out")
    assert (found["plain"]["runs"], found["delta"]["runs"]) == ("3", "0")


@pytest.mark.parametrize(
    ("hours", "text"), [(0.004, "< 0.01"), (0.2, "0.20"), (9.994, "9.99"), (380.4, "380"), (1234.0, "1,234")]
)
def test_hours(hours: float, text: str) -> None:
    assert _hours(hours) == text


def test_studies_over_sizes_and_searches(tmp_path: Path) -> None:
    found = rows(written(tmp_path, SIZES), tmp_path / "out")
    assert list(found) == ["short plain", "short delta", "long plain", "long delta"]
    per_token = training_flops_per_token(config(written(tmp_path), "plain").model).training
    assert found["long plain"]["FLOPs"] == f"{3 * 60 * 32 * per_token:.3g}"
    found = rows(written(tmp_path, SEARCH), tmp_path / "out")
    # The baseline and two of three candidates go on to the second rung.
    assert sorted(one["runs"] for one in found.values()) == ["2", "3", "3", "3"] and found["plain"]["runs"] == "3"


def test_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = written(tmp_path, TUNE), tmp_path / "out"
    main(["study", file, "--dry-run", "--gpu", "h200", "--out", str(out)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Study tiny: Does it help?" in printed and "In all 10 runs" in printed and "hours of one such GPU" in printed
    assert not out.exists()
    for arguments, message in (
        (["--gpu", "h100"], "--gpu belongs to --dry-run"),
        (["--dry-run", "--gpu", "h10"], "there is no GPU 'h10'; did you mean 'h100'?"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["study", file, *arguments, "--out", str(out)])
        assert ended.value.code == 2 and message in capsys.readouterr().err.replace("\n", " ")


def test_the_first_rung_for_a_gpu_takes_ten_minutes_by_the_roofline(tmp_path: Path) -> None:
    """Of its whole vocabulary; with what that leaves out it is meant for 25."""
    source = text_file(tmp_path / "text.txt", words=3000)
    study = load_study(
        "gpu-ladder", {"train": {"data": {"source": str(source), "tokenizer": "bytes"}, "model": {"vocab_size": 4096}}}
    )
    table = preview(study, tmp_path / "out", gpu_named("h100"))
    assert {int(row[2]) for row in table.rows} == {5}
    total = re.search(r"FLOPs, ([0-9.]+) hours", " ".join(table.notes))
    assert total and 0.01 < float(total[1]) < 10 / 60

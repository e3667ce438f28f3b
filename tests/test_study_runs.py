"""A study from its file to the report, by the command: interrupted, extended, diverging, failing."""

import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepdelta import load
from deepdelta.cli import main
from deepdelta.config import from_plain
from deepdelta.data import load_corpus
from deepdelta.files import HELD, locked
from deepdelta.lab import runner
from deepdelta.lab.analysis.results import Sample, StudyResults, load_results
from deepdelta.lab.experiments import pool
from deepdelta.lab.experiments.config import load_study
from deepdelta.lab.experiments.places import Places
from deepdelta.lab.experiments.plan import Plan
from deepdelta.lab.experiments.pool import Runner
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.experiments.training_run import TrainingRun
from deepdelta.training import RunDirectory
from tiny_runs import (
    assert_same_run,
    forget,
    quietly,
    record_anew,
    recorded,
    rows,
    start,
    tensors,
    text_file,
    trained_here,
    wait_for_step,
)

# As users run it: tyro's mark for a missing option is no Path, which the run-time type checks would refuse.
pytestmark = pytest.mark.usefixtures("unchecked")

CONDITIONS = {
    "additive": 'changes.model.residual = { rule = "additive", value_channels = 1, expansion = "repeat" }',
    # A dot in the name, which a file's suffix must not swallow.
    "ddl-1.5": 'changes.model.residual.preset = "paper-cc"',
    "twin": 'changes.model.residual = { rule = "additive", value_channels = 1, expansion = "repeat" }',
    "diverging": "changes = { lr = 1e30, warmup = 0 }",
}


def study_file(folder: Path, *conditions: str, steps: int = 30, name: str = "tiny") -> Path:
    source = text_file(folder / "text.txt")
    parts = "\n".join(f'[conditions."{c}"]\nsummary = "about {c}"\n{CONDITIONS[c]}' for c in conditions)
    file = folder / "study.toml"
    file.write_text(
        f"""
name = "{name}"
question = "Does it run?"
baseline = "additive"
seeds = [0]
cost_rounds = 2
rewrite_tokens = 70
[train]
steps = {steps}
lr = 2e-3
batch_size = 2
warmup = 3
eval_every = 10
eval_tokens = 64
final_eval_tokens = 200
checkpoint_every = 20
device = "cpu"
threads = 1
data = {{ source = "{source}" }}
model = {{ context = 16, layers = 1, heads = 2, dim = 16 }}
{parts}
"""
    )
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    """A study's folder, which tests only read or copy, and what the command printed."""
    file = study_file(folder, "additive", "ddl-1.5", "twin")
    with start("study", file, "--out", folder / "out", "--workers", "2", cwd=folder) as process:
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return folder / "out", printed


@pytest.fixture
def copy(finished: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def again(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *options: str) -> tuple[StudyResults, str]:
    capsys.readouterr()
    main(["study", str(folder / "study.toml"), "--out", str(out), *options])
    return load_results(out / "results.json"), capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *options: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["study", str(folder / "study.toml"), "--out", str(out), *options])
    assert ended.value.code == 2
    return capsys.readouterr().err


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_results_are_the_numbers_of_the_runs(finished: tuple[Path, str], folder: Path) -> None:
    out, printed = finished
    results, records = load_results(out / "results.json"), RecordFile(out).rows()
    assert (results.name, results.baseline, results.seeds) == ("tiny", "additive", (0,))
    assert results.command.startswith(f"deepdelta study {folder}/study.toml --out ")
    assert (results.budget.steps, results.budget.tokens_per_step, results.budget.threads_per_run) == (30, 32, 1)
    assert results.validation.tokens == 192 and "windows of 16 tokens" in results.validation.contexts
    for condition in results.conditions:
        run = out / "runs" / f"{condition.name}-seed0"
        recorded = list(RunDirectory(run).metrics())
        assert condition.runs[0].validation_loss == recorded[-1]["validation_loss"]
        assert recorded[-1]["final"] and recorded[-1]["validation_tokens"] == 192
        assert condition.runs[0].seconds == recorded[-1]["seconds"] > 0
        curve = from_plain(RunRecord, records[f"{condition.name}-seed0"]).curve
        for kind, key in (("train_loss", "loss"), ("validation_loss", "validation_loss")):
            shown = [(p.step, getattr(p, kind)) for p in curve if getattr(p, kind) is not None]
            expected = [(r["step"], r[key]) for r in recorded if key in r and not r.get("final")]
            assert shown == [(step, pytest.approx(value, abs=1e-6)) for step, value in expected]
        assert condition.parameters == sum(p.numel() for p in load(run).model.parameters())
        assert condition.summary == f"about {condition.name}"
        assert condition.cost is not None and condition.cost.rounds == 2 and condition.cost.peak_bytes > 0
        assert f"{condition.runs[0].validation_loss:.4f}" in printed and condition.name in printed
        assert results.corpus.sha256 == RunDirectory(run).environment()["corpus_sha256"]
    additive, ddl, _ = results.conditions
    assert (additive.rule, ddl.rule, ddl.value_channels) == ("additive", "delta", 4)
    assert additive.cost is not None and additive.cost.speed_ratio == additive.cost.peak_ratio == 1.0
    assert ddl.parameters > additive.parameters and ddl.flops_per_token > additive.flops_per_token


def test_rewrites_are_counted_on_whole_windows_of_text(finished: tuple[Path, str]) -> None:
    additive, ddl, _ = load_results(finished[0] / "results.json").conditions
    assert [(r.layer, r.sublayer) for r in ddl.rewrites] == [(0, "attention"), (0, "mlp")]
    for rewrite in ddl.rewrites:
        assert rewrite.gate_histogram is not None and sum(rewrite.gate_histogram) == 64  # 4 windows of 16 in 70 tokens
        assert rewrite.gate_mean == pytest.approx(1.0, abs=0.2)
        assert rewrite.discrepancy_before is not None and rewrite.discrepancy_after is not None
        assert rewrite.discrepancy_after < rewrite.discrepancy_before
        assert rewrite.state_norm is not None and rewrite.state_norm > 0
    assert all(r.gate_histogram is None and r.gate_mean is None for r in additive.rewrites)


def test_a_sample_is_what_the_trained_model_writes_after_the_held_out_text(finished: tuple[Path, str]) -> None:
    for condition in load_results(finished[0] / "results.json").conditions:
        run = finished[0] / "runs" / f"{condition.name}-seed0"
        (model, tokenizer), validation = load(run), load_corpus(RunDirectory(run).config().data).validation
        assert tokenizer is not None and condition.sample is not None
        ids = [int(one) for one in validation[:8]]
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            while len(ids) < 16:  # the whole text in one pass for each new token: no cache
                logits = model(torch.tensor([ids])).logits[0, -1].double() / 0.8
                ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=draw)))
        assert condition.sample == Sample(prompt=tokenizer.decode(ids[:8]), text=tokenizer.decode(ids[8:]))


def test_report_and_words(finished: tuple[Path, str]) -> None:
    out, printed = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>") and "Does it run?" in page and "ddl-1.5" in page
    assert 'src="plotly.min.js"' in page and (out / "plotly.min.js").exists()
    assert f"Results: {out / 'results.json'}" in printed and f"Report:  {out / 'report.html'}" in printed
    assert "No intervals" in printed and "Traceback" not in printed
    assert re.search(r"Study tiny (\d+)/\1 ", printed) and "Costs 2/2" in printed


def test_all_conditions_of_a_seed_see_the_same_data_in_the_same_order(finished: tuple[Path, str]) -> None:
    runs = finished[0] / "runs"
    assert_same_run(runs / "twin-seed0", runs / "additive-seed0")  # which any other batch at any step would end
    # Also where the models differ: with the same embedding at the start, the first losses are nearly the same.
    first = [rows(runs / f"{name}-seed0")[0]["loss"] for name in ("additive", "ddl-1.5")]
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], abs=0.2)
    assert tensors(runs / "ddl-1.5-seed0").keys() > tensors(runs / "additive-seed0").keys()


def test_a_study_that_is_finished_is_not_run_again(
    capsys: pytest.CaptureFixture[str], copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "launch", lambda *_: pytest.fail("a finished run was started"))
    before, old = contents(copy / "runs"), load_results(copy / "results.json")
    costs = (copy / "costs.json").stat().st_mtime_ns
    results, _ = again(capsys, folder, copy)
    assert contents(copy / "runs") == before and (copy / "costs.json").stat().st_mtime_ns == costs
    assert results.conditions == old.conditions and results.corpus == old.corpus


def test_new_seeds_and_conditions_run_alone(
    capsys: pytest.CaptureFixture[str], copy: Path, tmp_path: Path, folder: Path
) -> None:
    """Seed 1 is new, and so is a condition that diverges, which is a result and no failure."""
    file = study_file(tmp_path, "additive", "diverging")
    source = folder / "text.txt"
    file.write_text(file.read_text().replace(str(tmp_path / "text.txt"), str(source)))
    before = contents(copy / "runs")
    results, printed = again(capsys, tmp_path, copy, "--seeds", "0", "1")
    after = contents(copy / "runs")
    assert all(after[path] == before[path] for path in before)
    assert {path.name for path in after} - {path.name for path in before} == {
        f"{name}.{end}" for name in ("additive-seed1", "diverging-seed0", "diverging-seed1") for end in ("json", "log")
    }
    assert results.seeds == (0, 1)
    additive, diverging = results.conditions
    assert [run.seed for run in additive.runs] == [0, 1]
    assert len({run.validation_loss for run in additive.runs}) == 2
    assert [run.validation_loss for run in diverging.runs] == [None, None] and diverging.rewrites == ()
    assert "diverged" in printed and diverging.parameters > 0
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "2 runs diverged; comparisons rest on the seeds that remain." in page
    assert all(math.isfinite(p.train_loss) for run in diverging.runs for p in run.curve if p.train_loss is not None)


def test_a_folder_with_another_study_is_refused(
    capsys: pytest.CaptureFixture[str], copy: Path, tmp_path: Path, folder: Path
) -> None:
    before = contents(copy)
    for changes, message in (
        ({"steps": 31}, "already holds this study with other settings of additive (steps: 30 there, 31 here)"),
        ({"name": "other"}, "already holds the study 'tiny'"),
    ):
        study_file(tmp_path, "additive", "ddl-1.5", **changes)
        file = tmp_path / "study.toml"
        file.write_text(file.read_text().replace(str(tmp_path / "text.txt"), str(folder / "text.txt")))
        assert message in fails(capsys, tmp_path, copy)
    assert "with other settings of additive (corpus: SHA-256 " in fails(capsys, folder, copy, "--source", __file__)
    assert contents(copy) == before


def test_a_changed_corpus_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished runs are not trained again on the new text, and their losses are not shown as if they were of it."""
    config = load_study(str(study_file(tmp_path, "additive", steps=2)))
    quietly(config.train_config("additive", 0), tmp_path / "out" / "runs" / "additive-seed0")
    monkeypatch.setattr(runner, "measure", lambda *_: {})
    with (tmp_path / "text.txt").open("a") as text:
        text.write("more")
    said = fails(capsys, tmp_path, tmp_path / "out")
    assert "the runs of this study were trained on different corpora, which do not compare" in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_run_that_fails_passes_its_message_on(
    capsys: pytest.CaptureFixture[str], copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy / "runs" / "ddl-1.5-seed0"
    forget(copy, "ddl-1.5-seed0")
    RunDirectory(run).cut_metrics(20)
    checkpoint = (run / "checkpoint.safetensors").read_bytes()
    (run / "checkpoint.safetensors").write_bytes(checkpoint[:-1])
    said = fails(capsys, folder, copy)
    assert f"error: the run {run} failed: error: {run}/checkpoint.safetensors is truncated or damaged" in said
    assert f"(all of it: {run}.log)" in said
    kill = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(pool, "launch", lambda *_: subprocess.Popen(kill))
    assert f"the run {run} was ended by SIGKILL; the same command continues" in fails(capsys, folder, copy)


def test_interrupted_it_continues_to_the_same_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, out = study_file(tmp_path, "additive", "ddl-1.5", steps=150), tmp_path / "out"
    one, other = out / "runs" / "additive-seed0", out / "runs" / "ddl-1.5-seed0"
    with start("study", file, "--out", out, "--workers", "1", cwd=tmp_path) as process:
        wait_for_step(one, 25, process)
        process.send_signal(signal.SIGINT)
        printed = process.communicate()[0]
    assert process.returncode == 130, printed
    assert "Every run has saved its step; the same command continues the study." in printed
    assert 25 <= RunDirectory(one).step() == RunDirectory(one).last_recorded_step() < 150
    assert not other.exists() and not RunDirectory(one).busy
    results, _ = again(capsys, tmp_path, out, "--workers", "2")
    logs = {run: (run.parent / f"{run.name}.log").read_text() for run in (one, other)}
    assert [logs[run].count("Device cpu") for run in (one, other)] == [2, 1]
    assert f"Continuing {one} at step " in logs[one]
    config = load_study(str(file))
    for run, name in ((one, "additive"), (other, "ddl-1.5")):
        quietly(config.train_config(name, 0), tmp_path / name)
        assert_same_run(run, tmp_path / name)
        assert results.condition(name).runs[0].validation_loss == rows(tmp_path / name)[-1]["validation_loss"]


def test_the_runs_of_a_killed_study_save_their_step_and_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early, with the killed study's lock on the folder free; the same command ends in the bits of a whole run."""
    steps, out = 200, tmp_path / "out"
    run = out / "runs" / "additive-seed0"
    file = study_file(tmp_path, "additive", steps=steps)
    with start("study", file, "--out", out, "--workers", "1", cwd=tmp_path) as process:
        wait_for_step(run, 5, process)
        process.kill()
    while RunDirectory(run).busy:
        time.sleep(0.01)
    assert 5 <= RunDirectory(run).step() == RunDirectory(run).last_recorded_step() < steps
    assert (out / HELD).exists()
    with locked(out):
        pass
    assert trained_here(monkeypatch) == []
    results, _ = again(capsys, tmp_path, out)
    quietly(load_study(str(file)).train_config("additive", 0), tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole")
    assert results.condition("additive").runs[0].validation_loss == rows(run)[-1]["validation_loss"]


def twin(copy: Path, folder: Path) -> TrainingRun:
    """Of the study's runs that of seed 0."""
    config = load_study(str(folder / "study.toml"))
    settings = config.train_config("twin", 0)
    corpus = load_corpus(settings.data)
    return Plan(config, corpus, corpus, RecordFile(copy)).run("twin", "twin", settings)


def test_a_run_that_is_still_busy_is_waited_for(copy: Path, folder: Path) -> None:
    run = twin(copy, folder)
    assert not run.waits(())
    with RunDirectory(run.path).locked():
        assert run.waits(())


def test_the_line_of_progress_tells_records_and_the_loss_of_runs(copy: Path, folder: Path) -> None:
    run = twin(copy, folder)
    RunDirectory(run.path).cut_metrics(15)
    said: list[tuple[int, str]] = []
    reporter = SimpleNamespace(update=lambda done, facts: said.append((done, facts)), note=said.append)
    work = {"twin-seed0": 100.0, "other": 20.0, "third": 7.0}
    runs = Runner(Places(workers=1), work, "s of work", {"other"}, lambda: False, reporter)
    runs.report([], [run], "tuning")
    runs.report([run], [], "tuning")
    loss = rows(run.path)[-1]["loss"]
    facts = "s of work, 1/3 records (tuning)"
    assert said == [(70, f"{facts}, twin-seed0 15/30 loss {loss:.3f}"), (70, facts)]


def test_a_study_made_of_another_folder_s_records_runs_nothing(
    capsys: pytest.CaptureFixture[str], copy: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "launch", lambda *_: pytest.fail("a run of another folder was made again"))
    results, _ = again(capsys, folder, tmp_path / "merged", "--merge", str(copy))
    old = load_results(copy / "results.json")
    assert [one.runs for one in results.conditions] == [one.runs for one in old.conditions]
    rows = recorded(copy).items()
    record_anew(
        tmp_path / "changed",
        {name: row | {"metrics": row["metrics"] | {"validation_loss": 9.0}} for name, row in rows},
    )
    said = fails(capsys, folder, tmp_path / "merged", "--merge", str(tmp_path / "changed"))
    assert "contradict each other (metrics)" in said and said.count("\n") == 1

"""`deepdelta watch`: what it says of files in every state, and that it leaves them as they are; the page of a study at
work."""

import io
import json
import lzma
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepdelta import UserError
from deepdelta.cli import main
from deepdelta.config import to_plain
from deepdelta.files import locked, write_json
from deepdelta.lab import runner, watching
from deepdelta.lab.analysis.results import StudyResults
from deepdelta.lab.experiments import pool
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.experiments.work import WORK, Work
from deepdelta.lab.watching import ENDED, look, watch
from deepdelta.training import RunDirectory
from test_study_runs import CONDITIONS, study_file
from tiny_runs import config, quietly, start, text_file, trained_here, wait_for_step


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


def begun(run: Path, source: Path, rows: list[dict[str, Any]], steps: int = 20) -> Path:
    """A run directory as one at work has it."""
    run.mkdir(parents=True)
    write_json(run / "config.json", to_plain(config(source, steps=steps)))
    (run / ".lock").touch()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def step(number: int, **more: float) -> dict[str, Any]:
    return {"step": number, "loss": 4.0 - number / 10, "lr": 0.1, "gradient_norm": 1.0, "seconds": number / 2, **more}


VALIDATION = {
    "step": 3,
    "validation_loss": 3.25,
    "validation_tokens": 64,
    "final": False,
    "seconds": 1.5,
    "gate_mean": 0.75,
}
SKIPPED = {"step": 4, "skipped": 1, "lr": 0.1, "seconds": 2.0}


def test_a_finished_run_is_shown_once_and_left_as_it_is(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    quietly(config(source), run)
    before = contents(run)
    capsys.readouterr()
    main(["watch", str(run)])
    (line,) = capsys.readouterr().out.splitlines()
    rows = list(RunDirectory(run).metrics())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert line.startswith(
        f"run  finished  step 20/20  loss {losses[-1]:.4f}  validation {rows[-1]['validation_loss']:.4f}"
    )
    assert "tokens/s" in line and "gate" in line and "ETA" not in line
    assert contents(run) == before


def test_pace_time_left_gate_and_skips_of_a_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "run", source, [step(1), step(2), step(3), VALIDATION, SKIPPED])
    assert look(run)[0][0].state == "stopped"
    with RunDirectory(run).locked():
        (one,), studies, at_work = look(run)
        assert not studies
        assert at_work and one.state == "running" and (one.step, one.steps, one.skipped) == (4, 20, 1)
        # 2 x 16 tokens a step, a step each half second.
        assert one.pace == 64.0 and one.left == 8.0
        assert (one.loss, one.validation_loss, one.gate) == (3.7, 3.25, 0.75)
        assert one.line == (
            "run  running, 1 skipped  step 4/20  loss 3.7000  validation 3.2500  tokens/s 64  ETA 0:08  gate 0.750"
        )
        # Half-written, damaged and foreign lines are passed over.
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"ste\n5\n\x00\n' + json.dumps(step(5)) + "\n" + json.dumps(step(6))[:30])
        assert look(run)[0][0].step == 5
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 6, "diverged": True}) + "\n")
    assert look(run)[0][0].state == "diverged" and not look(run).at_work
    # Where the system does not tell who holds a lock, by how young the files are.
    monkeypatch.setattr(watching, "LOCKS", tmp_path / "absent")
    again = begun(tmp_path / "again", source, [step(1), step(2)])
    assert look(again).at_work
    for file in again.iterdir():
        os.utime(file, (0, 0))
    assert not look(again).at_work


def test_before_the_first_step(source: Path, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", source, [])
    for name in ("metrics.jsonl", "config.json"):
        (run / name).unlink()
        with RunDirectory(run).locked():
            assert [one.state for one in look(run)[0]] == ["running"]
        assert [one.state for one in look(run)[0]] == ["waiting"]


def record(name: str, **changes: Any) -> RunRecord:
    given = {"metrics": {"validation_loss": 2.5, "steps": 20.0}, "seconds": 1.0, "commit": None, "finished": "now"}
    given |= {"kind": "training", "experiment": "e", "condition": "c", "seed": 0, "settings": {"steps": 20}}
    return RunRecord(name=name, versions={}, machine={}, threads=1, **given | changes)


def test_a_study_by_its_records_and_its_runs(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with locked(out):
        file = RecordFile(out)
        file.append(to_plain(record("a-1.5-seed0")))
        file.append(to_plain(record("b-seed0", diverged="at step 5", metrics={"steps": 4.0})))
        begun(out / "runs" / "c-seed0", source, [step(1), step(2)])
        for name in ("a-1.5-seed0", "c-seed0", "d-seed0"):
            (out / "runs" / f"{name}.log").touch()
        with (out / "runs.jsonl.xz").open("ab") as being_written:
            being_written.write(lzma.compress(b"half")[:9])
        runs, (whole,), at_work = look(out)
        assert at_work and [(one.name, one.state) for one in runs] == [
            ("a-1.5-seed0", "finished"),
            ("b-seed0", "diverged"),
            ("c-seed0", "stopped"),
            ("d-seed0", "running"),
        ]
        assert runs[0].line == "a-1.5-seed0  finished  step 20/20  validation 2.5000"
        assert whole.line == f"{out}  2 of 4 runs ended"
        # Of five runs, each a share of the work: b had ended 30 seconds ago, a has since, c is at step 2 of 20.
        amounts = {"a-1.5-seed0": 10.0, "b-seed0": 10.0, "c-seed0": 20.0, "d-seed0": 20.0, "e-seed0": 28.0}
        Work(amounts=amounts, made=10.0, began=time.time() - 30).write(out / WORK)
        (whole,) = look(out).studies
        assert (whole.ended, whole.runs) == (2, 5) and whole.left == pytest.approx(66 * 30 / 12, rel=0.01)
        assert whole.line == f"{out}  2 of 5 runs ended  ETA 2:45"
        # Before anything is made the pace is not known.
        Work(amounts=amounts, made=22.0, began=time.time() - 30).write(out / WORK)
        assert look(out).studies[0].left is None
    assert not look(out).at_work
    # A study over sizes holds studies.
    assert [one.name for one in look(tmp_path)[0]] == [f"out/{one.name}" for one in runs]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_of_any_width_says_all(source: Path, tmp_path: Path, width: int) -> None:
    out = tmp_path / "out"
    file = RecordFile(out)
    for seed in range(30):
        file.append(to_plain(record(f"a-condition-of-a-long-name-seed{seed}")))
    begun(out / "runs" / "b-seed0", source, [step(1), step(2)])
    (out / "runs" / "b-seed0.log").touch()
    screen = io.StringIO()
    watch(out, Console(file=screen, force_terminal=True, width=width, height=99, color_system=None))
    text = re.sub(r"\x1b\[[\d;?]*\w", "\n", screen.getvalue()).replace("\r", "\n")
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    shown = " ".join(text[text.rindex("30 of 31 runs ended") :].split())  # the last of what was drawn
    assert shown.count("finished") == ENDED
    # What has not ended, then the last that ended.
    assert [shown.index(name) for name in ("b-seed0 stopped", "seed29", "seed11")] == sorted(
        shown.index(name) for name in ("b-seed0 stopped", "seed29", "seed11")
    )
    assert "3.8000" in shown and "2/20" in shown and ("tokens/s 64" in shown) == (width < 100)


def test_a_terminal_without_a_cursor_gets_lines(source: Path, tmp_path: Path) -> None:
    run, screen = begun(tmp_path / "run", source, [step(1)]), io.StringIO()
    watch(run, Console(file=screen, force_terminal=True, _environ={"TERM": "dumb"}))
    assert screen.getvalue() == "run  stopped  step 1/20  loss 3.9000\n"


def test_in_a_pipe_a_line_a_change(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "run", source, [step(1)])
    lock = RunDirectory(run).locked()
    lock.__enter__()
    looks = iter([lambda: None, lambda: begun_further(run), lambda: lock.__exit__(None, None, None)])
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: next(looks)())
    pipe = io.StringIO()
    watch(run, Console(file=pipe))
    assert [line.split("  loss")[0] for line in pipe.getvalue().splitlines()] == [
        "run  running  step 1/20",
        "run  running  step 2/20",
        "run  stopped  step 2/20",
    ]


def begun_further(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(2)) + "\n")


def test_what_is_no_run_and_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SystemExit) as ended:
            main(["watch", str(path)])
        assert ended.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "must be the folder of a run or of a study, but holds neither" in said
    with pytest.raises(UserError, match="holds neither"):
        look(tmp_path / "absent")


def test_leaving_a_run_at_work(source: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the watching with code 130, and the run goes on."""
    run, long = tmp_path / "run", 10**6
    write_json(tmp_path / "a.json", to_plain(config(source, steps=long, eval_every=long, checkpoint_every=long)))
    with start("train", run, "--config", tmp_path / "a.json", cwd=tmp_path) as process:
        wait_for_step(run, 3, process)
        with start("watch", run, cwd=tmp_path) as leaving:
            assert leaving.stdout is not None and leaving.stdout.readline().startswith("run  running  step ")
            leaving.send_signal(signal.SIGINT)
            assert leaving.wait() == 130
        assert process.poll() is None
        process.terminate()
        process.communicate()
    assert process.returncode == 0


@pytest.mark.usefixtures("unchecked")
def test_the_page_while_a_study_is_at_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each run, also one that diverged; it loads itself anew until the study ends or is stopped."""
    file = study_file(tmp_path, "additive", "ddl-1.5", steps=4)
    text = file.read_text().replace("seeds = [0]", "seeds = [0, 1]").replace("rewrite_tokens = 70", "")
    file.write_text(text.replace(CONDITIONS["additive"], CONDITIONS["diverging"]))
    out, pages = tmp_path / "out", []
    launched = trained_here(monkeypatch)
    write, here = runner.write_report, pool.launch

    def note(results: StudyResults, path: Path, **options: Any) -> None:
        write(results, path, **options)
        pages.append(path.read_text())

    def stopped(run: Any, device: Any) -> Any:
        if len(launched) == 3:
            raise KeyboardInterrupt
        return here(run)

    monkeypatch.setattr(runner, "write_report", note)
    monkeypatch.setattr(pool, "launch", stopped)
    command = ["study", str(file), "--out", str(out), "--workers", "1"]
    with pytest.raises(SystemExit):
        main(command)
    monkeypatch.setattr(pool, "launch", here)
    main(command)
    *at_work, halted, continued, last = pages
    assert [page.count('http-equiv="refresh"') for page in pages] == [1, 1, 1, 0, 1, 0]
    for ended, page in enumerate(at_work, 1):
        assert f"At work: {ended} of 4 runs have ended. This is no result yet." in page
    assert "Stopped: 3 of 4 runs have ended." in halted and "At work: 3 of 4 runs have ended." in continued
    assert "no result yet" not in last

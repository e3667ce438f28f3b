"""Runs of a task as processes, what is kept of them, what is refused, and the tables; `deepdelta task` as typed."""

import dataclasses
import json
import math
import shutil
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from deepdelta import UserError
from deepdelta.cli import main
from deepdelta.config import from_plain, to_plain
from deepdelta.lab.analysis.comparison import Comparison
from deepdelta.lab.analysis.tasks import TaskResults
from deepdelta.lab.experiments import pool
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import FILE_NAME, RecordFile
from deepdelta.lab.experiments.run import Run
from deepdelta.lab.tasks import load_task, named_tasks, registry, runner
from deepdelta.lab.tasks.fitting import check_loss
from deepdelta.lab.tasks.results import collect
from deepdelta.lab.tasks.runner import TaskRun, default_folder, run_task
from deepdelta.lab.tasks.task import read_overrides
from deepdelta.lab.views.tasks import task_markdown
from tiny_runs import Ended, forget, record_anew, recorded

pytestmark = pytest.mark.usefixtures("unchecked")

TINY = {"length": 2, "steps": 2, "batch_size": 2, "test_words": 4, "group": "S3"}
SETS = [argument for key, value in TINY.items() for argument in ("--set", f"{key}={value}")]
CONDITIONS = list(load_task("words").conditions)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are started, made in this process and at once."""
    return made_here(monkeypatch)


def made_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def launch(run: Run, device: str | None) -> Ended:
        names.append(run.name)
        module, given = run.command()
        assert module == "deepdelta.lab.tasks.runner"
        try:
            runner.make_run(**json.loads(given))
        except UserError as error:
            run.log.write_text(f"20\nerror: {error}\n")
            return Ended(1)
        return Ended()

    monkeypatch.setattr(pool, "launch", launch)
    return names


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task's folder, made by the command."""
    out = tmp_path_factory.mktemp("task") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        made_here(monkeypatch)
        main(["task", "words", *SETS, "--seeds", "0", "1", "--out", str(out)])
    return out


def results_of(out: Path) -> TaskResults:
    return from_plain(TaskResults, json.loads((out / "results.json").read_text(encoding="utf-8")))


def compared(results: TaskResults, condition: str, reference: str) -> Comparison | None:
    pair = (condition, reference)
    return next((one.comparison for one in results.contrasts if (one.condition, one.reference) == pair), None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["task", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    return said


def test_the_command_writes_records_results_and_a_table(finished):
    results = results_of(finished)
    assert results.task == "words" and results.seeds == (0, 1)
    assert [condition.name for condition in results.conditions] == CONDITIONS
    assert len(recorded(finished)) == 6
    for condition in results.conditions:
        assert list(condition.metrics) == [0, 1]
        for seed, metrics in condition.metrics.items():
            record = recorded(finished)[f"{condition.name}-seed{seed}"]
            assert record["metrics"] == metrics and record["settings"]["group"] == "S3" and record["seconds"] > 0
    text = (finished / "table.md").read_text(encoding="utf-8")
    assert text == task_markdown(results)
    assert text.startswith("# words: word problems") and "no interval" in text


def test_a_process_gives_what_this_one_gives(finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    expected = recorded(out)["gate-0-2-seed1"]
    forget(out, "gate-0-2-seed1")
    main(["task", "words", *SETS, "--seeds", "0", "1", "--out", str(out)])
    made = recorded(out)["gate-0-2-seed1"]
    assert made["metrics"] == expected["metrics"] and made["settings"] == expected["settings"]
    assert to_plain(results_of(out))["conditions"] == to_plain(results_of(finished))["conditions"]
    given = {"experiment": "words", "condition": "gate-0-2", "seed": 1, "settings": {}}
    assert TaskRun(name="gate-0-2-seed1", records=RecordFile(out), **given).share == 0.99


def test_what_has_its_record_is_not_run_again(finished, tmp_path, ran):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    forget(out, "gate-0-2-seed1")
    (out / "results.json").unlink()
    again = run_task("words", (0, 1), out, overrides=TINY)
    assert ran == ["gate-0-2-seed1"]
    assert to_plain(again)["conditions"] == to_plain(results_of(finished))["conditions"]
    assert results_of(out) == again
    run_task("words", (1, 5), out, overrides=TINY)
    assert ran[1:] == [f"{condition}-seed5" for condition in CONDITIONS]


def test_runs_go_seed_by_seed(tmp_path, ran):
    run_task("words", (3, 2), tmp_path, overrides=TINY)
    assert ran == [f"{condition}-seed{seed}" for seed in (3, 2) for condition in CONDITIONS]


def test_records_that_are_damaged_or_of_other_settings(finished, tmp_path, ran):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    with pytest.raises(UserError, match=r"gate-0-1-seed0 was made with other settings \(steps: 2 there, 3 here\)"):
        run_task("words", (0, 1), out, overrides=TINY | {"steps": 3})
    with pytest.raises(UserError, match=r"group: 'S3' there, 'Z2' here.*; give another --out"):
        run_task("words", (0, 1), out, overrides=TINY | {"group": "Z2"})
    rows = recorded(out)
    whole = rows["gate-0-2-seed0"]
    older = {key: value for key, value in whole["settings"].items() if key not in ("rank", "feedback")}
    old = {"settings": older, "commit": "0123456789abcdef", "machine": whole["machine"] | {"processor": "Old One"}}
    record_anew(out, rows | {"gate-0-2-seed0": whole | old})  # of a time without those
    results = run_task("words", (0, 1), out, overrides=TINY)
    assert not ran
    assert results.made[-1] == "1 at commit 0123456789ab on Old One" and len(results.made) == 2
    assert "; 1 at commit 0123456789ab on Old One." in (out / "table.md").read_text(encoding="utf-8")
    record_anew(out, rows | {"gate-0-2-seed0": whole | {"metrics": {"other": 1.0}}})
    with pytest.raises(UserError, match=r"made with other settings \(it measured no accuracy\)"):
        run_task("words", (0, 1), out, overrides=TINY)
    record_anew(out, rows | {"gate-0-2-seed0": whole | {"experiment": "recall"}})
    with pytest.raises(UserError, match=r"made with other settings \(the task recall\)"):
        run_task("words", (0, 1), out, overrides=TINY)
    record_anew(out, rows | {"gate-0-2-seed0": {key: value for key, value in whole.items() if key != "metrics"}})
    with pytest.raises(UserError, match=r"gate-0-2-seed0: metrics: Field required"):
        run_task("words", (0, 1), out, overrides=TINY)
    (out / FILE_NAME).write_bytes(b"no records")
    with pytest.raises(UserError, match=r"runs.jsonl.xz is damaged .*; restore it, or give another --out"):
        run_task("words", (0, 1), out, overrides=TINY)
    assert not ran


def test_a_number_that_is_not_finite_is_kept_and_compared_with_nothing(tmp_path, ran, monkeypatch):
    def measured(settings: Any, seed: int, progress: Any) -> dict[str, float]:
        failed = (settings.gate_range, settings.target, seed) == ("0-1", "symbol", 1)
        return {"accuracy": math.inf if failed else 0.5 + seed / 10, "other": 2.0}

    task = dataclasses.replace(load_task("words"), run=measured)
    monkeypatch.setattr(runner, "load_task", lambda name: task)
    results = run_task("words", (0, 1), tmp_path, overrides=TINY)
    assert results == results_of(tmp_path)
    assert results.conditions == run_task("words", (0, 1), tmp_path, overrides=TINY).conditions
    by_name = {one.name: one for one in results.conditions}
    assert by_name["gate-0-1"].metrics == {0: {"accuracy": 0.5, "other": 2.0}, 1: {"accuracy": None, "other": 2.0}}
    assert compared(results, "gate-0-2", "gate-0-1") is None
    assert "not finite" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_a_run_that_diverges_is_a_record_without_a_number(tmp_path, ran, monkeypatch):
    """It is left out by name, and comparisons rest on the other seeds."""
    losses = {"gate-0-1": [0.1, 0.5, 0.3, 0.4, 0.2, 0.3], "gate-0-2": [0.9, 0.7, 0.8, 0.6, 0.9, 0.7]}
    by_gate = {"0-1": losses["gate-0-1"], "0-2": losses["gate-0-2"]}

    def measured(settings: Any, seed: int, progress: Any) -> dict[str, float]:
        if (settings.gate_range, settings.target, seed) == ("0-2", "symbol", 1):
            check_loss(math.nan, 1.0, 7, 0.5)
        return {"accuracy": by_gate[settings.gate_range][seed]}

    task = dataclasses.replace(load_task("words"), run=measured)
    monkeypatch.setattr(runner, "load_task", lambda name: task)
    seeds = tuple(range(6))
    results = run_task("words", seeds, tmp_path, overrides=TINY)
    count = len(ran)
    assert count == 6 * len(CONDITIONS) and results_of(tmp_path) == results
    assert run_task("words", seeds, tmp_path, overrides=TINY).conditions == results.conditions and len(ran) == count
    record = recorded(tmp_path)["gate-0-2-seed1"]
    assert record["metrics"] == {} and record["diverged"].startswith("the training loss must stay finite, got nan at")
    found = next(one for one in results.conditions if one.name == "gate-0-2")
    assert found.diverged == (1,) and sorted(found.metrics) == [0, 2, 3, 4, 5]
    pairs = [(losses["gate-0-2"][seed], losses["gate-0-1"][seed]) for seed in (0, 2, 3, 4, 5)]
    interval = scipy.stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval()
    found_here = compared(results, "gate-0-2", "gate-0-1")
    assert found_here is not None and found_here.t_interval is not None
    assert (found_here.t_interval.low, found_here.t_interval.high) == pytest.approx((interval.low, interval.high))
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| gate-0-2 |"))
    assert "| 5 | 0.7800 | 0.9000 diverged 0.8000 0.6000 0.9000 0.7000 |" in row
    assert "Diverged, and left out of means and comparisons: gate-0-2 seed 1." in text


def test_finished_runs_are_kept_when_one_fails(tmp_path, ran, monkeypatch):
    task, made = load_task("words"), []

    def run(settings: Any, seed: int, progress: Any) -> dict[str, float]:
        if seed == 1:
            raise UserError("no room")
        made.append(seed)
        return {"accuracy": 1.0}

    monkeypatch.setattr(runner, "load_task", lambda name: dataclasses.replace(task, run=run))
    with pytest.raises(UserError, match=r"the run .*-seed1.json failed: error: no room \(all of it: .*-seed1.log\)"):
        run_task("words", (0, 1), tmp_path)
    # One that ends while another fails may wait for its record; the next start finds it.
    kept = {*recorded(tmp_path), *(path.stem for path in (tmp_path / "runs").glob("*.json"))}
    assert made == [0, 0, 0] and len(kept) == 3
    assert not (tmp_path / "results.json").exists()


def test_an_interruption_keeps_what_is_finished(tmp_path, ran, monkeypatch, capsys):
    monkeypatch.setattr(pool, "stop_signals", lambda: nullcontext(lambda: len(ran) == 1))
    with pytest.raises(KeyboardInterrupt):
        run_task("words", (0,), tmp_path, overrides=TINY, workers=1)
    assert "Finished runs are kept; the same command continues with what is missing." in capsys.readouterr().err
    assert list(recorded(tmp_path)) == ran == [f"{CONDITIONS[0]}-seed0"]


# Names and settings


@pytest.mark.parametrize("name", named_tasks())
def test_every_task_has_a_baseline_controls_and_its_name(name):
    task = load_task(name)
    assert task.name == name and task.baseline in task.conditions
    controls = {variant.control for variant in task.conditions.values()} - {None}
    assert controls <= set(task.conditions)
    for condition in task.conditions:
        settings = task.settings_of(condition)
        assert from_plain(type(settings), to_plain(settings)) == settings


def test_unknown_names(capsys):
    assert "there is no task 'wrods'; did you mean 'words'?" in refused(capsys, "wrods")
    assert "task words: unknown key 'stepz'; did you mean 'steps'?" in refused(capsys, "words", "--set", "stepz=3")
    said = refused(capsys, "words", "--set", "group=S4")
    assert "task words: group: Input should be 'Z2', 'S3', 'D4' or 'A5', got 'S4'" in said
    said = refused(capsys, "recall", "--set", "residual.target=linaer")
    assert "residual.target: Input should be" in said and "got 'linaer'" in said
    assert "KEY=VALUE, such as steps=2000, got 'steps'" in refused(capsys, "words", "--set", "steps")
    assert "seeds must be different numbers from 0 on" in refused(capsys, "words", "--seeds", "1", "1")
    assert "workers must be at least 1, got 0" in refused(capsys, "words", "--workers", "0")
    with pytest.raises(UserError, match="task words has no condition 'gate-0-3'; did you mean"):
        load_task("words").settings_of("gate-0-3")


def test_a_package_that_is_absent(monkeypatch):
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    monkeypatch.setattr(registry.importlib, "import_module", missing)
    with pytest.raises(
        UserError, match=r"the task tabular need the extra 'lab', but .* sklearn is absent: .*-e \"\.\[lab\]\""
    ):
        load_task("tabular")


def test_settings_as_typed():
    given = ["steps=1_000", "lr=1e-3", "group=S3", "source=folder:/a b", "residual.target=magnitude", "depths=[2, 4]"]
    expected = {"steps": 1000, "lr": 0.001, "group": "S3", "source": "folder:/a b", "depths": [2, 4]}
    assert read_overrides(given) == expected | {"residual": {"target": "magnitude"}}
    assert read_overrides(["residual.rank=2", "residual.gate=constant"]) == {
        "residual": {"rank": 2, "gate": "constant"}
    }
    for wrong in ("steps", "=3", "#a=1", "a b=c", "[a=b]", ""):
        with pytest.raises(UserError, match="settings are given as KEY=VALUE"):
            read_overrides([wrong])


def test_what_conditions_differ_in_is_not_set_for_all():
    recall = load_task("recall")
    assert recall.settings_of("delta", {"residual": {"gate_init": 0.5}}).residual.gate_init == 0.5
    for name in ("rule", "value_channels"):
        with pytest.raises(UserError, match=f"residual.{name} is what condition delta of task recall sets itself"):
            recall.settings_of("delta", {"residual": {name: 8, "gate_init": 0.5}})


def test_other_settings_go_to_other_folders():
    assert default_folder("words") == Path("runs/task-words")
    assert default_folder("words", ["group=S3"]) == Path("runs/task-words-group-S3")
    assert default_folder("digits", ["source=folder:/a/b", "steps=5"]) == Path(
        "runs/task-digits-source-folder-a-b-steps-5"
    )


# Comparisons and tables


def results_with(values: dict[str, list[float]]) -> TaskResults:
    task = load_task("recall")
    cells = {
        (name, seed): RunRecord(
            name=f"{name}-seed{seed}",
            kind="task",
            experiment="recall",
            condition=name,
            seed=seed,
            settings={},
            metrics={"accuracy_overwritten": value, "loss": 1 - value} | ({"more": 1.0} if name == "delta" else {}),
            seconds=1.0,
            commit=None,
            versions={},
            machine={},
            threads=1,
            finished="now",
        )
        for name, column in values.items()
        for seed, value in enumerate(column)
    }
    return dataclasses.replace(
        collect(task, (0, 1, 2, 3, 4), cells, "deepdelta task recall"), summary="summary", commit="abc"
    )


VALUES = {
    "additive": [0.50, 0.52, 0.55, 0.51, 0.53],
    "write-only": [0.60, 0.60, 0.66, 0.64, 0.61],
    "delta": [0.80, 0.84, 0.79, 0.90, 0.85],
    "delta-4": [0.7],
}


def test_comparisons_are_paired_by_seed_and_corrected_together():
    results = results_with(VALUES)
    pairs = [("write-only", "additive"), ("delta", "additive"), ("delta", "write-only")]
    raw = [scipy.stats.ttest_rel(VALUES[one], VALUES[other]) for one, other in pairs]
    running = 0.0
    for rank, index in enumerate(sorted(range(3), key=lambda i: raw[i].pvalue)):
        comparison, interval = compared(results, *pairs[index]), raw[index].confidence_interval()
        assert comparison is not None and comparison.t_interval is not None
        running = max(running, (3 - rank) * raw[index].pvalue)
        assert comparison.adjusted_p == pytest.approx(running)
        assert (comparison.t_interval.low, comparison.t_interval.high) == pytest.approx((interval.low, interval.high))
    assert compared(results, "delta-4", "write-only-4") is None  # its control has no run


def test_the_table_holds_every_measure_with_its_interval():
    text = task_markdown(results_with(VALUES))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert "recall: summary (accuracy\\_overwritten, fraction of answers, higher is better)" in text
    assert "deepdelta task recall" in text and "commit abc" in text
    row = next(line for line in lines if line[0] == "delta")
    assert row[:4] == ["delta", "5", "0.8360", "0.8000 0.8400 0.7900 0.9000 0.8500"]
    changes = {row[1]: row[2:] for row in lines if row[0] == "delta" and len(row) == 6}
    assert changes["additive"][0] == "+0.3140" and changes["write-only"][0] == "+0.2140"
    assert changes["additive"][3].startswith("higher by 0.3140 (95 % interval 0.2")
    heading = next(line for line in lines if line[0] == "measured")
    loss = next(line for line in lines if line[0] == "loss")
    losses = [1 - value for value in VALUES["delta"]]
    reach = scipy.stats.t.ppf(0.975, 4) * statistics.stdev(losses) / 5**0.5
    assert loss[heading.index("delta")] == f"0.164 ± {reach:.2g}"
    assert loss[heading.index("delta-4")] == "0.3" and loss[heading.index("write-only-4")] == "-"
    more = next(line for line in lines if line[0] == "more")
    assert more[heading.index("delta")] == "1" and more[heading.index("additive")] == "-"


def test_conditions_that_are_named_run_alone_with_the_baseline(ran: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["task", "words", *SETS, "--seeds", "0", "1", "--conditions", "state-target", "--out", str(out)])
    some = ["gate-0-1", "state-target"]
    assert sorted(ran) == sorted(f"{name}-seed{seed}" for name in some for seed in (0, 1))
    found = results_of(out)
    assert [one.name for one in found.conditions] == some
    assert [(one.condition, one.reference) for one in found.contrasts] == [("state-target", "gate-0-1")]
    assert found.left_out == ("gate-0-2",) and "not chosen were gate-0-2" in (out / "table.md").read_text()
    # What is there stays, and the others are added.
    ran.clear()
    results = run_task("words", (0, 1), out, overrides=TINY)
    assert (
        sorted(ran) == ["gate-0-2-seed0", "gate-0-2-seed1"] and [one.name for one in results.conditions] == CONDITIONS
    )
    assert results.left_out == () and "not chosen" not in (out / "table.md").read_text()
    with pytest.raises(UserError, match="conditions must name at least one of task words"):
        run_task("words", (0, 1), out, overrides=TINY, conditions=[])
    with pytest.raises(UserError, match=r"task words has no condition 'gate-0-3'; did you mean 'gate-0-"):
        run_task("words", (0, 1), out, overrides=TINY, conditions=["gate-0-3"])


def test_a_control_that_is_left_out_is_not_compared_with() -> None:
    task = load_task("registers").only(["delta-4"])
    assert list(task.conditions) == ["additive", "delta-4"] and task.conditions["delta-4"].control is None
    both = load_task("registers").only(["delta-4", "write-only-4"])
    assert both.conditions["delta-4"].control == "write-only-4"

"""Cells, budgets and tuning: what is run once, with how many steps, at which rate, and on what text."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deepdelta import PRESETS, GPTConfig, UserError
from deepdelta.config import from_plain, merged, to_plain
from deepdelta.data import load_corpus, train_tail
from deepdelta.lab import runner
from deepdelta.lab.analysis import statistics
from deepdelta.lab.analysis.comparison import Comparison
from deepdelta.lab.analysis.results import StudyResults, load_results
from deepdelta.lab.experiments.config import StudyConfig
from deepdelta.lab.experiments.places import Places
from deepdelta.lab.experiments.plan import Plan
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import FILE_NAME, RecordFile
from deepdelta.lab.experiments.training_run import CURVE_POINTS, canonical, curve
from deepdelta.lab.measure.cost import Cost
from deepdelta.lab.runner import run_study
from deepdelta.training import RunDirectory, TrainConfig
from tiny_runs import RUNS, forget, record_anew, recorded, study_from, text_file, trained_here, without_curves

STUDY = """
name = "tiny"
question = "Does it run?"
baseline = "plain"
seeds = [0, 1]
budgets = ["tokens", "flops", "time"]
cost_rounds = 1
rewrite_tokens = 64
[tune]
lr = [1e-2, 1e-5]
seeds = [7]
steps = 12
[train]
steps = 24
warmup = 4
eval_every = 8
eval_tokens = 64
final_eval_tokens = 200
checkpoint_every = 100
RUNS
[conditions.plain]
summary = "x + h"
changes.model.residual = { rule = "additive", value_channels = 1, expansion = "repeat" }
[conditions.delta]
summary = "a rewrite"
control = "write"
changes.model.residual = { value_channels = 4, expansion = "embedding_conv" }
[conditions.write]
summary = "its control"
changes.model.residual = { rule = "write_only", value_channels = 4, expansion = "embedding_conv" }
""".replace("RUNS\n", RUNS)
CELLS = 3 * 2 + 3 * 2 + 2 * 2 * 2  # tuning; at equal tokens; of the two others at equal FLOPs and at equal time


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(runner, "measure", lambda *_: costs())
    monkeypatch.setattr(runner, "EXTENSIONS", 0)
    return trained_here(monkeypatch)


study = partial(study_from, STUDY)


def plan_of(config: StudyConfig, out: Path) -> Plan:
    corpus = load_corpus(config.train_config("plain", 0).data)
    return Plan(config, corpus, train_tail(corpus), RecordFile(out))


def costs(speed: float = 0.5) -> dict[str, Cost]:
    def cost(ratio: float) -> Cost:
        return Cost(
            tokens_per_second=1000 * ratio,
            speed_ratio=ratio,
            speed_ratio_low=ratio,
            speed_ratio_high=ratio,
            rounds=1,
            peak_bytes=1,
            peak_ratio=1.0,
        )

    return {"plain": cost(1.0), "delta": cost(speed), "write": cost(speed)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, unchecked_file: None) -> tuple[Path, StudyResults, list[str]]:
    """A finished study's folder, its results and the runs that were made."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "measure", lambda *_: costs())
        monkeypatch.setattr(runner, "EXTENSIONS", 0)
        names = trained_here(monkeypatch)
        results = run_study(study(folder), folder / "out", places=Places(workers=2), command="deepdelta study")
    return folder, results, names


@pytest.fixture
def done(original: tuple[Path, StudyResults, list[str]], tmp_path: Path) -> tuple[StudyConfig, Path, StudyResults]:
    """The study, a copy of its folder, and its results."""
    shutil.copy(original[0] / "text.txt", tmp_path / "text.txt")
    shutil.copytree(original[0] / "out", tmp_path / "out")
    return study(tmp_path), tmp_path / "out", original[1]


def test_a_study_from_its_records_alone(
    done: tuple[StudyConfig, Path, StudyResults],
    original: tuple[Path, StudyResults, list[str]],
    launched: list[str],
    tmp_path: Path,
) -> None:
    """Every run once; with nothing but the committed records, nothing runs and the results are the same."""
    config, out, results = done
    names = original[2]
    assert len(names) == len(set(names)) == CELLS
    assert set(recorded(out)) == set(names)
    assert load_results(out / "results.json") == without_curves(results)
    # Losses, steps and rates of the results are those of the runs.
    for name in ("delta+flops-seed1", "write+time-seed0", "plain-seed0"):
        rows = list(RunDirectory(out / "runs" / name).metrics())
        condition, seed = results.condition(name.split("+")[0].removesuffix("-seed0")), int(name[-1])
        budget: Any = "flops" if "flops" in name else "time" if "time" in name else "tokens"
        run = next(run for run in condition.at(budget) if run.seed == seed)
        assert (run.validation_loss, run.steps) == (rows[-1]["validation_loss"], rows[-1]["step"])
        assert condition.tuned is not None
        assert RunDirectory(out / "runs" / name).config().lr == condition.tuned.lr == 1e-2
    plain = results.condition("plain")
    for budget in ("flops", "time"):
        assert plain.losses(budget) == plain.losses() and not plain.at(budget)[0].curve

    clone = tmp_path / "clone"
    clone.mkdir()
    shutil.copy(out / FILE_NAME, clone)
    again = run_study(config, clone, command="deepdelta study")
    assert not launched and again.conditions == results.conditions


def test_a_record_is_small_and_holds_its_run(done: tuple[StudyConfig, Path, StudyResults]) -> None:
    _, out, _ = done
    run = RunDirectory(out / "runs" / "delta-seed1")
    record = from_plain(RunRecord, recorded(out)["delta-seed1"])
    rows = list(run.metrics())
    assert (record.condition, record.seed, record.validation_loss) == ("delta", 1, rows[-1]["validation_loss"])
    assert (record.metrics["steps"], record.validation_tokens) == (24, 192)  # whole windows of 16
    assert record.seconds == rows[-1]["seconds"] and record.machine == run.environment()["machine"]
    assert record.contexts == "windows of 16 tokens without overlap, evenly spread"
    assert (out / FILE_NAME).stat().st_size < 2_000 * CELLS and str(out.parent) not in str(recorded(out))
    tuning = from_plain(RunRecord, recorded(out)["delta+tune-lr0.01-seed7"])
    assert (
        tuning.inputs["corpus_sha256"] != record.inputs["corpus_sha256"]
        and tuning.metrics["steps"] == 12
        and not tuning.rewrites
    )


def test_what_a_finished_record_forbids_and_allows(
    done: tuple[StudyConfig, Path, StudyResults], launched: list[str], tmp_path: Path
) -> None:
    _, out, results = done
    before = {file: file.read_bytes() for file in out.rglob("*.json")}
    shutil.rmtree(out / "runs")
    for old, new, message in (
        ('rule = "write_only"', 'rule = "erase_only"', r"settings of write \(model.residual.rule: 'write_only' there"),
        (
            "steps = 12",
            "steps = 13",
            r"settings of plain \(steps: 12 there, 13 here.*plain\+tune-lr0.01-seed7; give",
        ),
        ("warmup = 4", "warmup = 3", r"settings of plain \(warmup: 4 there, 3 here"),
    ):
        with pytest.raises(UserError, match=message):
            run_study(study(tmp_path, (old, new)), out, command="")
    with pytest.raises(UserError, match=r"settings of plain \(corpus: SHA-256 "):
        run_study(study(tmp_path, source=text_file(tmp_path / "more.txt", 650)), out, command="")
    assert not launched and all(file.read_bytes() == old for file, old in before.items() if file.exists())
    # Another place, another copy of the text, other threads: the same numbers, so the same records.
    moved = Path(shutil.copy(tmp_path / "text.txt", tmp_path / "copy.txt"))
    config = study(tmp_path, ("threads = 1", "threads = 2"), ("checkpoint_every = 100", ""), source=moved)
    assert run_study(config, out, command="").conditions == results.conditions and not launched


def test_a_missing_or_damaged_record(done: tuple[StudyConfig, Path, StudyResults], launched: list[str]) -> None:
    config, out, results = done
    file = out / FILE_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(UserError, match=r"runs.jsonl.xz is damaged \(.*\); restore it, or give another --out"):
        run_study(config, out, command="")
    file.write_bytes(whole)
    forget(out, "plain-seed0")  # the run is still there, so it need not be made again
    (out / "runs" / "plain-seed0.json").unlink()  # which names the place where the text was
    assert run_study(config, out, command="").conditions == results.conditions and not launched
    forget(out, "plain-seed0")
    shutil.rmtree(out / "runs" / "plain-seed0")
    assert run_study(config, out, command="").condition("plain").losses() == results.condition("plain").losses()
    assert launched == ["plain-seed0"]


def test_checkpoints_need_not_be_kept(tmp_path: Path, launched: list[str]) -> None:
    small = (('budgets = ["tokens", "flops", "time"]', "keep_checkpoints = false"), ("[0, 1]", "[0]"))
    config = study(tmp_path, *small)
    results = run_study(config, tmp_path / "out", command="")
    assert not list((tmp_path / "out").rglob("checkpoint.safetensors"))
    launched.clear()
    assert run_study(config, tmp_path / "out", command="").conditions == results.conditions and not launched


def test_records_differ_in_every_setting_that_decides_numbers() -> None:
    base = TrainConfig(
        model=GPTConfig(residual=PRESETS["paper-cc"]), lr=1e-3, schedule="constant"
    )  # the one that a cooldown goes with
    same: dict[str, Any] = {
        "device": "cpu",
        "threads": 3,
        "data": {"source": "x", "pattern": "*.py", "mixture": [["x", 1.0]]},
    }
    same |= {"checkpoint_every": 7, "keep_last": 2, "keep_best": True, "async_save": False}
    other: dict[str, Any] = {
        "model": {"dim": 64, "repeats": 2, "residual": {"rule": "write_only"}},
        "data": {"validation_fraction": 0.2, "held_out": "train_tail"},
        "precision": "fp32",
        "backend": "reference",
        "memory": "save",
        "parallel": "fsdp",
        "recompute": True,
        "compile": True,
        "draw_repeats": True,
        "betas": [0.8, 0.9],
        "final_eval_tokens": 10,
        "schedule": "cosine",
        "average": "ema",
        "optimizer": "muon",
    }
    numbers = {key: value + 1 for key, value in to_plain(base).items() if type(value) is int and key not in same}
    numbers |= {key: value / 2 for key, value in to_plain(base).items() if type(value) is float}
    assert {*other, *numbers, *same} == set(to_plain(base))

    def of(changes: dict[str, Any]) -> str:
        return json.dumps(canonical(from_plain(TrainConfig, merged(to_plain(base), changes))))

    assert of(same) == of({})
    # These are settings of an average, of Muon and of a looped GPT, which must then be there.
    numbers |= {"ema_decay": None, "average_steps": None, "momentum": None, "draw_repeats": None}
    parted = [{"average": "ema", "ema_decay": 0.5}, {"average": "last"}, {"average": "last", "average_steps": 9}]
    parted += [{"optimizer": "muon", "momentum": 0.5}, {"model": {"repeats": 2}, "draw_repeats": True}]
    parts = [{key: {name: value}} for key in ("model", "data") for name, value in other[key].items()]
    flat = [{key: value} for key, value in (other | numbers).items() if key not in ("model", "data")]
    flat = [changes for changes in flat if None not in changes.values()] + parted
    seen = [of({}), *(of(changes) for changes in (*parts, *flat))]
    assert len(set(seen)) == len(seen)


def test_a_setting_that_records_do_not_know_yet_has_its_default(
    done: tuple[StudyConfig, Path, StudyResults],
) -> None:
    """As after an update that adds one: records made before it stay good, unless the study sets it."""
    config, out, _ = done
    rows = recorded(out)
    del rows["plain-seed0"]["settings"]["clip"]
    record_anew(out, rows)
    run = plan_of(config, out).run("plain", "plain", dataclasses.replace(config.train_config("plain", 0), lr=1e-2))
    assert run.name == "plain-seed0" and run.stored() is not None
    with pytest.raises(UserError, match=r"clip: 1.0 there, 2.0 here"):
        dataclasses.replace(run, settings=dataclasses.replace(run.settings, clip=2.0)).stored()
    assert "clip" in canonical(run.settings)


def test_curves_keep_validations_and_thin_the_rest() -> None:
    rows: list[dict[str, Any]] = []
    for step in range(1, 1001):
        rows.append({"step": step, "loss": 5 - step / 300, "seconds": step * 0.1})
        if step % 100 == 0:
            rows.append({"step": step, "validation_loss": 6 - step / 300, "final": False, "seconds": step * 0.1})
    rows.append({"step": 1000, "validation_loss": 1.0, "final": True, "seconds": 100.0})
    points = curve(rows)
    assert len(points) == CURVE_POINTS
    assert [p.step for p in points if p.validation_loss is not None] == list(range(100, 1001, 100))
    steps = [p.step for p in points if p.train_loss is not None]
    assert steps[0] == 1 and steps[-1] == 1000 and max(b - a for a, b in itertools.pairwise(steps)) <= 21
    assert [p.step for p in points] == sorted(p.step for p in points) and curve([]) == ()
    assert all(p.train_loss is None or p.train_loss == pytest.approx(5 - p.step / 300, abs=1e-6) for p in points)


def test_every_distinct_comparison_is_evaluated_once(
    done: tuple[StudyConfig, Path, StudyResults], launched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From records to results, table, picture, page and terminal."""
    evaluated: list[tuple[float, ...]] = []

    def counted(differences: Sequence[float]) -> Comparison:
        evaluated.append(tuple(differences))
        return paired(differences)

    paired = statistics.paired
    monkeypatch.setattr(statistics, "paired", counted)
    config = study(
        tmp_path,
        ("[train]", '[factorials.parts]\nfactors = ["part"]\n[train]'),
        *(
            (f'summary = "{one}"', f'summary = "{one}"\nfactors = {{ part = "{one}" }}')
            for one in ("x + h", "a rewrite")
        ),
    )
    results = run_study(config, done[1], command="deepdelta study", self_contained=True)
    assert 'src="plotly.min.js"' not in (done[1] / "report.html").read_text(encoding="utf-8")
    names = [(one.budget, one.condition, one.reference) for one in results.contrasts]
    assert not launched and len(names) == len(set(names)) == 9
    assert len(results.effects) == 3 and len(evaluated) == 9 + 3
    assert load_results(done[1] / "results.json").contrasts == results.contrasts

"""The file of records: whole, cut short at every byte, damaged, compacted; and that of the committed studies."""

import dataclasses
import lzma
from dataclasses import fields, replace
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from deepdelta import UserError
from deepdelta.config import from_plain
from deepdelta.lab.analysis.comparison import Comparison, Interval
from deepdelta.lab.analysis.results import RunResult, StudyResults, load_results
from deepdelta.lab.analysis.scaling import Scaling
from deepdelta.lab.analysis.stored import load_stored
from deepdelta.lab.analysis.tasks import TaskResults
from deepdelta.lab.audit.findings import AuditResults
from deepdelta.lab.bench import BenchResults, depth, gradients
from deepdelta.lab.bench.tables import markdown as bench_markdown
from deepdelta.lab.experiments import costs
from deepdelta.lab.experiments.config import load_study
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import FILE_NAME, RecordFile, take_over
from deepdelta.lab.experiments.search import SearchResults
from deepdelta.lab.tasks import load_task
from deepdelta.lab.tasks.results import collect
from deepdelta.lab.views import scaling_markdown, search_markdown, study_markdown
from deepdelta.lab.views.audit import audit_markdown
from deepdelta.lab.views.tasks import task_markdown
from report_samples import anew

ROWS = [{"name": name, "loss": loss, "note": "ü" * 40} for name, loss in (("a", 1.5), ("b", None), ("c", 0.25))]
RESULTS = Path(__file__).parents[1] / "results"
every_committed = pytest.mark.usefixtures("unchecked_file")
"""Thousands of records; what reads them is checked in the tests above, and in those of studies."""


def filled(folder: Path, rows: list[dict[str, object]] = ROWS) -> RecordFile:
    file = RecordFile(folder)
    for row in rows:
        file.append(row)
    return file


def test_what_is_appended_is_read(tmp_path):
    filled(tmp_path)
    again = RecordFile(tmp_path)
    assert list(again.rows().values()) == ROWS and "b" in again and "d" not in again
    assert "ü" in lzma.open(tmp_path / FILE_NAME, "rt", encoding="utf-8").read().encode().decode("unicode_escape")
    assert RecordFile(tmp_path / "absent").rows() == {}


def record(name: str, loss: float = 1.5, **changes: object) -> dict[str, object]:
    row = {"name": name, "experiment": "tiny", "condition": "a", "seed": 0, "settings": {"lr": 0.1}, "inputs": {}}
    return row | {"metrics": {"validation_loss": loss}, "diverged": None, "seconds": 3.0, "machine": "one"} | changes


def test_records_of_other_folders_are_taken_over_once(tmp_path):
    out, one, other = (tmp_path / name for name in ("out", "one", "other"))
    filled(out, [record("a")])
    filled(one, [record("a", seconds=9.0, machine="two"), record("b", seed=1)])
    filled(other, [record("b", seed=1, machine="three"), record("c", seed=2, diverged="at step 3", metrics={})])
    take_over(out, [one, other])
    rows = RecordFile(out).rows()
    assert list(rows) == ["a", "b", "c"] and rows["a"]["machine"] == "one" and rows["b"]["machine"] == "one"
    before = (out / FILE_NAME).read_bytes()
    take_over(out, [other, one])
    assert (out / FILE_NAME).read_bytes() == before  # nothing is new
    take_over(tmp_path / "new", [one, other])
    assert list(RecordFile(tmp_path / "new").rows()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (record("a", loss=1.25), r"the records of a in \S+out and \S+other contradict each other \(metrics\)"),
        (record("a", settings={"lr": 0.2}), r"contradict each other \(settings\): leave one of the folders out"),
        (record("b", experiment="big"), r"other holds b of big, and \S+out the study tiny"),
        (None, "other must hold the records of a study, runs.jsonl.xz, but holds none"),
    ],
)
def test_records_that_contradict_are_refused_and_none_is_taken_over(tmp_path, row, message):
    out, one, other = (tmp_path / name for name in ("out", "one", "other"))
    filled(out, [record("a")])
    filled(one, [record("z", seed=3)])
    filled(other, [] if row is None else [row])
    with pytest.raises(UserError, match=message):
        take_over(out, [one, other])
    assert list(RecordFile(out).rows()) == ["a"]
    if row is not None and row["name"] == "b":
        with pytest.raises(UserError, match="the folders hold different studies, big and tiny"):
            take_over(tmp_path / "new", [one, other])


def test_cut_short_anywhere_it_holds_what_was_whole_and_goes_on(tmp_path):
    filled(tmp_path, ROWS[:2])
    whole = len((tmp_path / FILE_NAME).read_bytes())
    filled(tmp_path, ROWS[2:])
    data = (tmp_path / FILE_NAME).read_bytes()
    for length in range(whole, len(data)):
        (tmp_path / FILE_NAME).write_bytes(data[:length])
        assert list(RecordFile(tmp_path).rows().values()) == ROWS[:2], length
    filled(tmp_path, ROWS[2:])
    assert (tmp_path / FILE_NAME).read_bytes() == data


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    filled(tmp_path).compact()
    data = (tmp_path / FILE_NAME).read_bytes()
    for at in range(len(data)):
        (tmp_path / FILE_NAME).write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"runs.jsonl.xz.*; restore it, or give another --out"):
            assert not RecordFile(tmp_path).rows(), at
            raise UserError("runs.jsonl.xz holds nothing; restore it, or give another --out")


def test_compacted_it_holds_the_same_in_less(tmp_path):
    many = [{"name": f"run-{number}", "settings": {"lr": 0.001, "steps": 400}} for number in range(50)]
    file = filled(tmp_path, many)
    before = file.path.stat().st_size
    file.compact()
    assert file.path.stat().st_size < before / 5 and list(RecordFile(tmp_path).rows().values()) == many
    file.append({"name": "later"})
    assert list(RecordFile(tmp_path).rows()) == [*(row["name"] for row in many), "later"]


@pytest.mark.parametrize(("text", "message"), [("[1]", "line 1 must be a record"), ("{", "line 1 must hold a JSON")])
def test_what_is_no_record(tmp_path, text, message):
    (tmp_path / FILE_NAME).write_bytes(lzma.compress(text.encode()))
    with pytest.raises(UserError, match=message):
        RecordFile(tmp_path).rows()


def test_records_of_another_format_are_refused_with_the_version_that_reads_them(tmp_path):
    old = '{"name": "a", "commit": "abc", "versions": {"deepdelta": "0.1.0"}}'
    for row, message in (
        (old, "line 1 has format 0, and this version reads 1: read it with deepdelta 0.1.0 at commit abc."),
        ('{"format": 2, "name": "a"}', "line 1 has format 2, and this version reads 1: it does not say which version"),
    ):
        (tmp_path / FILE_NAME).write_bytes(lzma.compress(row.encode()))
        with pytest.raises(UserError, match=message):
            RecordFile(tmp_path).rows()


def study_again(file: Path, records: list[RunRecord]) -> StudyResults:
    """The committed study analysed anew, its losses those of the records."""
    results = load_results(file.parent / "results.json")
    known = {(one.condition, one.seed, one.metrics["steps"]): one.validation_loss for one in records}

    def recorded(condition: str, runs: tuple[RunResult, ...]) -> tuple[RunResult, ...]:
        return tuple(
            replace(run, validation_loss=known[condition, run.seed, run.steps or results.budget.steps]) for run in runs
        )

    conditions = tuple(
        replace(
            one,
            runs=recorded(one.name, one.runs),
            matched={budget: recorded(one.name, runs) for budget, runs in one.matched.items()},
        )
        for one in results.conditions
    )
    assert conditions == results.conditions
    return anew(results, conditions=conditions)


def assert_close(one: Comparison, other: Comparison) -> None:
    for field in fields(Comparison):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Interval):
            a, b = (a.low, a.high), (b.low, b.high)
        assert a == (None if b is None else pytest.approx(b, rel=1e-9)), field.name


@every_committed
@pytest.mark.parametrize("file", sorted(RESULTS.rglob(FILE_NAME)), ids=lambda file: file.parent.name)
def test_the_committed_comparisons_are_those_of_the_committed_records(file):
    records = [from_plain(RunRecord, row, where=name) for name, row in RecordFile(file.parent).rows().items()]
    assert records
    if (file.parent / "search.json").exists() or not (file.parent / "results.json").exists():
        return  # a search, or a study that has not ended
    if records[0].kind == "task":
        stored = load_stored(TaskResults, file.parent / "results.json", "deepdelta task")
        by_run = {(one.condition, one.seed): one for one in records}
        task = load_task(stored.task).only([one.name for one in stored.conditions])
        # Of some the task has another primary number since.
        again = collect(dataclasses.replace(task, primary=stored.primary), stored.seeds, by_run, stored.command)
        assert again.conditions == stored.conditions
        values = {(one.condition, one.seed): one.metrics.get(stored.primary) for one in records}
    else:
        stored, again = load_results(file.parent / "results.json"), study_again(file, records)
        assert again.headline == stored.headline and again.seeds_needed == stored.seeds_needed
        for one, other in zip(again.effects, stored.effects, strict=True):
            assert_close(one.comparison, other.comparison)
    for one, other in zip(again.contrasts, stored.contrasts, strict=True):
        assert (one.condition, one.reference, one.budget) == (other.condition, other.reference, other.budget)
        assert_close(one.comparison, other.comparison)
        if other.comparison.t_interval is None:
            continue
        if records[0].kind == "training":
            values = {(c.name, seed): x for c in stored.conditions for seed, x in c.losses(one.budget).items()}
        expected = ttest_rel(
            *([values[name, seed] for seed in other.differences] for name in (one.condition, one.reference))
        )
        interval = expected.confidence_interval()
        assert (other.comparison.t_interval.low, other.comparison.t_interval.high) == pytest.approx(interval, rel=1e-8)
        assert other.comparison.p_value == pytest.approx(expected.pvalue, rel=1e-8)


@every_committed
def test_the_committed_tables_are_those_of_the_stored_analysis():
    for file in RESULTS.rglob("table.md"):
        folder, stored = file.parent, file.with_name("results.json")
        if folder.name == "triton-sm90":
            continue  # the study of the kernels writes both itself
        if folder.name.startswith("audit-"):
            text = audit_markdown(load_stored(AuditResults, folder / "audit.json", "deepdelta audit"))
        elif (search := folder / "search.json").exists():
            text = search_markdown(load_stored(SearchResults, search, "deepdelta study"))
        elif (found := folder / "scaling.json").exists():
            laws = load_stored(Scaling, found, "deepdelta study")
            text = scaling_markdown(laws, {size: load_results(folder / size / "results.json") for size in laws.sizes})
        elif folder.name.startswith("task-"):
            text = task_markdown(load_stored(TaskResults, stored, "deepdelta task"))
        elif folder.name == "bench-gradients":
            text = gradients.markdown(load_stored(gradients.GradientResults, stored, "deepdelta bench"))
        elif folder.name == "bench-depth":
            found = load_stored(depth.DepthResults, stored, "deepdelta bench")
            text = depth.markdown(found)
            assert depth.picture(found) == (folder / "plot.svg").read_text(encoding="utf-8")
        elif folder.name.startswith("bench-"):
            text = bench_markdown(load_stored(BenchResults, stored, "deepdelta bench"))
        else:
            text = study_markdown(load_results(stored))
        assert text == file.read_text(encoding="utf-8"), folder.name


@every_committed
@pytest.mark.parametrize("file", sorted(RESULTS.rglob("costs.json")), ids=lambda file: file.parent.name)
def test_the_committed_costs_are_not_measured_again(file, monkeypatch):
    """Their conditions are those of the study files, whatever settings came later."""
    monkeypatch.setattr(costs, "measure_costs", lambda *given, **options: pytest.fail("measured again"))
    name, *size = file.parent.relative_to(RESULTS).parts
    study = load_study(name.removesuffix("-tinyshakespeare"))
    config = study.sized(size[0]) if size else study
    assert set(costs.measure(config, 256, file)) == set(config.conditions)

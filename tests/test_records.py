"""The file of records: whole, cut short at every byte, damaged, compacted; and that of the committed studies."""

import lzma
from pathlib import Path

import pytest

from deepdelta import UserError
from deepdelta.config import from_plain
from deepdelta.lab.analysis.results import load_results
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import FILE_NAME, RecordFile
from deepdelta.lab.tasks.results import TaskRecord

ROWS = [{"name": name, "loss": loss, "note": "ü" * 40} for name, loss in (("a", 1.5), ("b", None), ("c", 0.25))]
RESULTS = Path(__file__).parents[1] / "results"


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


@pytest.mark.parametrize("file", sorted(RESULTS.rglob(FILE_NAME)), ids=lambda file: file.parent.name)
def test_the_committed_records_are_those_of_the_committed_results(file):
    kind = TaskRecord if file.parent.name.startswith("task-") else RunRecord
    records = [from_plain(kind, row, where=name) for name, row in RecordFile(file.parent).rows().items()]
    assert records and (file.parent / "results.json").exists() | (file.parent / "search.json").exists()
    if kind is TaskRecord or not (file.parent / "results.json").exists():
        return
    results = load_results(file.parent / "results.json")
    known = {(one.condition, one.seed, one.steps): one.validation_loss for one in records}
    for condition in results.conditions:
        for budget in results.budgets:
            for run in condition.at(budget):
                steps = run.steps or results.budget.steps
                assert known[condition.name, run.seed, steps] == run.validation_loss, (condition.name, budget)

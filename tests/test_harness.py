"""`deepdelta evaluate --tasks`: lm-eval's numbers against direct computation, data from folders, what is refused."""

import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepdelta import generate, load
from deepdelta.cli import main
from deepdelta.data import ByteTokenizer
from deepdelta.harness import read_results
from deepdelta.training import RunDirectory
from tiny_runs import config, quietly, text_file

pytestmark = [pytest.mark.home, pytest.mark.usefixtures("unchecked")]
CONTEXT = 48


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    model = {"context": CONTEXT, "dim": 16, "layers": 2}
    quietly(config(text_file(folder / "text.txt"), steps=40, lr=0.02, backend="reference", model=model), folder / "run")
    return folder / "run"


def direct(run: Path, before: bytes, continuation: bytes) -> tuple[float, bool]:
    """log p of a continuation, in one row alone, the softmax written out in fp64."""
    value, greedy = 0.0, True
    # The window stays where it is for the whole continuation: its last token is predicted from a full context.
    window = (list(before) + list(continuation))[-CONTEXT - 1 : -1]
    with torch.no_grad():
        logits = load(run).model(torch.tensor([window])).logits[0].double()
    for place, one in enumerate(continuation, len(window) - len(continuation)):
        shares = torch.exp(logits[place] - logits[place].max())
        value += float(torch.log(shares[one] / shares.sum()))
        greedy &= int(shares.argmax()) == one
    return value, greedy


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


PAIRS = [
    ("def f(", "x):"),
    ("", "return"),
    ("gate and write ", "erase"),
    ("long " * 20, "state"),
    ("a", "€ b"),
    ("x", "y" * CONTEXT),
]


@pytest.mark.compatible("log-likelihoods of lm-eval's requests equal a direct computation", "lm-eval")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_those_of_a_direct_computation(run, batch_size):
    from deepdelta.harness.model import HarnessModel

    measured = HarnessModel(load(run).model, ByteTokenizer(), batch_size=batch_size)
    found = measured.loglikelihood(requests(*PAIRS))
    for (before, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        # What lm-eval does with spaces between the two, and with nothing before: the separator.
        moved = before.rstrip()
        given = moved.encode() if before else b"\0"
        expected = direct(run, given, (before[len(moved) :] + continuation).encode())
        assert value == pytest.approx(expected[0], rel=1e-5) and greedy == expected[1]
    model = load(run).model
    likeliest = bytes(generate(model, list(b"def "), tokens=3, temperature=0.0)).decode("latin-1")
    assert (
        measured.loglikelihood(requests(("def", f" {likeliest}")))[0][1]
        == direct(run, b"def", f" {likeliest}".encode())[1]
    )


def test_whole_texts_are_read_once_in_windows_that_do_not_overlap(run):
    from deepdelta.harness.model import HarnessModel

    text = "state gate write erase " * 5
    measured = HarnessModel(load(run).model, ByteTokenizer(), batch_size=3)
    (value,) = measured.loglikelihood_rolling(requests((text,)))
    ids, expected = text.encode(), 0.0
    whole = len(ids) // CONTEXT * CONTEXT
    for start in range(0, whole, CONTEXT):
        before = b"\0" if not start else ids[start - 1 : start]
        expected += direct(run, before, ids[start : start + CONTEXT])[0]
    # The last window is full too; only what is new in it counts.
    expected += direct(run, ids[:whole], ids[whole:])[0]
    assert value == pytest.approx(expected, rel=1e-5)


def test_what_is_written_ends_at_the_first_end(run):
    from deepdelta.harness.model import HarnessModel

    model = load(run).model
    measured = HarnessModel(model, ByteTokenizer(), batch_size=1)
    drawn = bytes(generate(model, list(b"def "), tokens=12, temperature=0.0)).decode(errors="replace")
    end = drawn[5:7]
    options: Sequence[dict[str, Any]] = ({"max_gen_toks": 12}, {"max_gen_toks": 12, "until": ["never", end]})
    whole, cut = (measured.generate_until(requests(("def ", one)))[0] for one in options)
    assert whole == drawn.partition("\0")[0] and cut == drawn.partition(end)[0] != whole


def rows_of(name: str) -> list[dict[str, Any]]:
    file = resources.files("deepdelta.harness") / "sets" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.compatible("deepdelta evaluate --tasks, offline, results in the run", "lm-eval", "datasets")
def test_the_tasks_that_ship_run_without_a_network(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    main(["evaluate", str(run), "--tasks", "deepdelta_words", "deepdelta_prose", "deepdelta_repeat"])
    shown = capsys.readouterr().out
    found = {result.task: result for result in read_results(run)}
    right = sum(
        max(range(4), key=lambda i: direct(run, row["context"].encode(), row["choices"][i].encode())[0])
        == row["answer"]
        for row in rows_of("words")
    )
    assert found["deepdelta_words"].metrics["acc"] == pytest.approx(right / 24)
    assert found["deepdelta_words"].questions == 24 and found["deepdelta_words"].step == RunDirectory(run).step()
    written = [
        bytes(generate(load(run).model, list(row["context"].encode()[-CONTEXT:]), tokens=32, temperature=0.0))
        for row in rows_of("repeat")
    ]
    exact = sum(
        text.decode(errors="replace").partition("\n")[0].partition("\0")[0] == row["answer"]
        for text, row in zip(written, rows_of("repeat"), strict=True)
    )
    assert found["deepdelta_repeat"].metrics["exact_match"] == exact / 16
    for name in found:
        assert name in shown
    assert f"{found['deepdelta_prose'].metrics['bits_per_byte']:.4f}" in shown
    main(["evaluate", str(run), "--tasks", "deepdelta_words", "--limit", "3"])
    again = [result for result in read_results(run) if result.task == "deepdelta_words"]
    assert [(result.limit, result.questions) for result in again] == [(None, 24), (3, 3)]
    main(["evaluate", str(run), "--tasks", "deepdelta_words", "--limit", "3"])
    assert len(read_results(run)) == 4
    main(["evaluate", str(run), "--tasks", "deepdelta_words", "--limit", "3", "--shots", "2"])
    assert [(result.shots, result.questions) for result in read_results(run)][-1] == (2, 3)


CHOICES = {"label": ["A", "B"], "text": ["light", "dark"]}
DATA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "arc_easy": ("ARC-Easy", "test", {"question": "Day is?", "choices": CHOICES, "answerKey": "A"}),
    "arc_challenge": ("ARC-Challenge", "test", {"question": "Night is?", "choices": CHOICES, "answerKey": "B"}),
    "hellaswag": (
        "default",
        "validation",
        {"ctx_a": "A man", "ctx_b": "he", "activity_label": "Run", "endings": ["runs.", "flies."], "label": "0"},
    ),
    "piqa": ("default", "validation", {"goal": "To cut", "sol1": "use a knife", "sol2": "use milk", "label": 0}),
    "winogrande": (
        "winogrande_xl",
        "validation",
        {"sentence": "Ann met Eve and _ waved.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    ),
    "openbookqa": ("main", "test", {"question_stem": "Day is", "choices": CHOICES, "answerKey": "A"}),
    "sciq": (
        "default",
        "test",
        {
            "support": "Ice is cold.",
            "question": "What is ice?",
            **{f"distractor{i}": f"hot {i}" for i in (1, 2, 3)},
            "correct_answer": "cold",
        },
    ),
    "boolq": ("boolq", "validation", {"passage": "Ice is cold.", "question": "is ice cold", "label": 1}),
}


def place_copies(folder: Path) -> None:
    """Data set repositories as the hub has them, four rows each."""
    import datasets

    from deepdelta.harness.tasks import PUBLIC

    configs: dict[str, list[str]] = {}
    for name, (config_name, tested, row) in DATA.items():
        repository = folder / PUBLIC[name].data
        for split in {"train", tested}:
            place = repository / config_name / f"{split}.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list([row] * 4).to_parquet(place)
        splits = "".join(f"\n  - split: {s}\n    path: {config_name}/{s}.parquet" for s in sorted({"train", tested}))
        configs.setdefault(PUBLIC[name].data, []).append(f"- config_name: {config_name}\n  data_files:{splits}\n")
    for data, held in configs.items():
        (folder / data / "README.md").write_text(f"---\nconfigs:\n{''.join(held)}---\n")


@pytest.mark.compatible(
    "ARC, HellaSwag, PIQA, WinoGrande, OpenBookQA, SciQ, BoolQ from copies of their data", "lm-eval"
)
def test_named_tasks_read_copies_of_their_data(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    place_copies(tmp_path / "data")
    main(["evaluate", str(run), "--tasks", *DATA, "--task-data", str(tmp_path / "data")])
    found = {result.task: result for result in read_results(run) if result.task in DATA}
    assert found.keys() == DATA.keys()
    assert all(result.questions == 4 and result.metrics["acc"] in (0.0, 1.0) for result in found.values())
    likelier = [direct(run, b"Question: Day is?\nAnswer:", f" {text}".encode())[0] for text in CHOICES["text"]]
    assert found["arc_easy"].metrics["acc"] == float(likelier[0] > likelier[1])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_refusals(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("deepdelta.data.hub.reachable", lambda address: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    said = refused(capsys, str(run), "--tasks", "arc_easy", "--task-data", str(tmp_path))
    assert (
        f"place a copy of the data set repository allenai/ai2_arc of the Hugging Face hub at {tmp_path}/allenai" in said
    )
    assert "the data of arc_easy are not here" in said and "whose data ship: deepdelta_words" in said
    assert "--tokens belongs to the loss" in refused(capsys, str(run), "--tasks", "arc_easy", "--tokens", "9")
    assert "--tasks needs the name of at least one task" in refused(capsys, str(run), "--tasks")
    assert "--shots belongs to --tasks" in refused(capsys, str(run), "--shots", "2")
    assert "limit must be at least 1, got -1" in refused(capsys, str(run), "--tasks", "arc_easy", "--limit", "-1")
    assert "must be a folder" in refused(capsys, str(run), "--tasks", "piqa", "--task-data", str(tmp_path / "no"))
    said = refused(capsys, str(run), "--tasks", "arc_esay")
    assert "there is no task 'arc_esay'; did you mean 'arc_easy'?" in said
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(capsys, str(run), "--tasks", "arc_easy")
    assert "need the extra 'eval', but the package lm_eval is absent" in said

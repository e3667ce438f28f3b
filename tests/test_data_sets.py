"""Data sets of the library `datasets`: saved by it, and streamed; without it and without a network.

Where a network would be asked, something stands in: for the library as a whole (`hub`), or for `load_dataset` alone.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deepdelta.cli import main
from deepdelta.data import Corpus, DataConfig, load_corpus
from deepdelta.data.packed import checked
from deepdelta.data.prepare import RECIPES, prepare
from deepdelta.data.tokenizer import BPETokenizer
from deepdelta.errors import UserError

TEXTS = [f"document {i}: größe and {'more ' * (i % 9)}of it\n" for i in range(80)]
ROWS: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
ROWS[7]["text"] = None
HELD = {row["text"] for row in ROWS} - {None}
NOTHING: dict[str, Any] = {"text": None}
OWN = ["held out " * 9, TEXTS[0], "held out " * 9]
"""A split validation: as it is, with what stands twice in it and in train."""
NAME = "hf://datasets/HuggingFaceFW/fineweb-edu/sample-100BT:train"


class Stream:
    """What streaming `load_dataset` gives."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)

    def skip(self, n: int) -> "Stream":
        return Stream(self.rows[n:])

    def take(self, n: int) -> "Stream":
        return Stream(self.rows[:n])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A library `datasets` whose hub has one data set; what was asked of it."""
    asked: list[Any] = []

    def load_dataset(
        path: str, name: str | None = None, *, split: str | None, revision: str | None, streaming: bool
    ) -> Stream | dict[str, Stream]:
        asked.append((path, name, split, revision, streaming))
        if path.startswith("no"):
            raise FileNotFoundError(f"Couldn't reach {path}\non the hub")
        if split is not None:
            return Stream(ROWS)
        own = {"two/splits": [{"text": text} for text in OWN], "two/other": [{"body": "none"}], "two/empty": [NOTHING]}
        return {"train": Stream(ROWS)} | ({"validation": Stream(own[path])} if path in own else {})

    stand_in = ModuleType("datasets")
    stand_in.__spec__ = ModuleSpec("datasets", None)
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr("deepdelta.data.hub.reachable", lambda address: False)
    return asked


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    BPETokenizer.train(TEXTS, vocab_size=320).save(tmp_path)
    return tmp_path / "tokenizer.json"


def load(source: str, cache: Path, **more: Any) -> Corpus:
    return load_corpus(DataConfig(source=source, **more), cache=cache)


def parts(corpus: Corpus) -> tuple[list[str], list[str]]:
    """The documents of both splits, in their order."""
    train, validation = (bytes(split).decode().split("\0") for split in (corpus.train, corpus.validation))
    return train, validation


def documents(corpus: Corpus) -> set[str]:
    return {document for split in parts(corpus) for document in split}


def test_the_hub_is_streamed_once_to_the_cache(hub, tmp_path):
    corpus = load(NAME, tmp_path)
    assert hub == [("HuggingFaceFW/fineweb-edu", "sample-100BT", "train", None, True)]
    assert documents(corpus) == HELD
    assert corpus.description.startswith("the data set HuggingFaceFW/fineweb-edu/sample-100BT:train: 79 documents")
    again = load(NAME, tmp_path)
    assert len(hub) == 1 and again.sha256 == corpus.sha256 and np.array_equal(again.train, corpus.train)
    short = load("hf://datasets/a/b.c@v1.0[:30]".replace("[", ":test["), tmp_path)
    assert hub[1:] == [("a/b.c", None, "test", "v1.0", True)] and documents(short) == {*TEXTS[:7], *TEXTS[8:30]}


def test_prepare_streams_and_goes_on_where_it_was_stopped(hub, tmp_path, tokenizer, monkeypatch):
    options: dict[str, Any] = {"tokenizer": tokenizer, "shard_tokens": 150, "validation_fraction": 0.2}
    sums = prepare("fineweb-edu", tmp_path / "whole", **options)
    assert hub == [("HuggingFaceFW/fineweb-edu", "sample-100BT", "train", None, True)]
    data = DataConfig(source=str(tmp_path / "whole"), tokenizer=str(tmp_path / "whole" / "tokenizer.json"))
    corpus = load_corpus(data, cache=tmp_path / "cache")
    assert corpus.tokenizer is not None and len(corpus.train) == sums["train"]
    ids = [*corpus.train.tolist(), *corpus.validation.tolist()]
    parts = corpus.tokenizer.decode(ids).split("<|endoftext|>")
    assert parts[0] == "" and set(parts[1:]) == HELD and ids.count(corpus.tokenizer.separator) == 79

    taken: list[int] = []
    whole = Stream.skip

    def cut(self: Stream, n: int) -> Stream:
        taken.append(n)
        rest = whole(self, n)
        if len(taken) == 1:
            rest.rows = [*rest.rows[:40], {"other": 1}]
        return rest

    monkeypatch.setattr(Stream, "skip", cut)
    monkeypatch.setattr("deepdelta.data.prepare._AT_ONCE", 200)
    with pytest.raises(UserError, match="has no column 'text', but 'other'; name the one with the text by field"):
        prepare("fineweb-edu", tmp_path / "parts", **options)
    prepare("fineweb-edu", tmp_path / "parts", **options)
    assert taken[0] == 0 and 10 < taken[1] <= 40
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_split_validation_is_held_out(hub, tmp_path):
    source = "hf://datasets/two/splits"
    corpus = load(source, tmp_path)
    assert hub == [("two/splits", None, split, None, True) for split in ("train", None)]
    assert parts(corpus) == ([text for text in TEXTS if text != TEXTS[7]], OWN)
    assert "82 documents" in corpus.description
    assert corpus.description.endswith(", split as the data set itself is (validation_fraction without effect)")
    assert load(source, tmp_path, validation_fraction=0.5).sha256 == corpus.sha256 and len(hub) == 2
    named = load(f"{source}:train", tmp_path)
    assert documents(named) == HELD and named.sha256 != corpus.sha256 and "split by document" in named.description
    tail = load(source, tmp_path, held_out="train_tail")
    assert np.array_equal(np.concatenate([tail.train, tail.validation]), corpus.train)


@pytest.mark.parametrize("name", ["one/split", "two/other", "two/empty"])
def test_without_text_in_a_split_validation_a_part_is_held_out(hub, tmp_path, tokenizer, name):
    for _ in range(2):
        corpus = load(f"hf://datasets/{name}", tmp_path)
        assert documents(corpus) == HELD and "split by document" in corpus.description
    assert [split for _, _, split, _, _ in hub] == ["train", None]
    by_name = load(f"hf://datasets/{name}:train", tmp_path)
    assert 0 < len(by_name.validation) < len(by_name.train)
    options: dict[str, Any] = {"tokenizer": tokenizer, "validation_fraction": 0.2}
    assert prepare(f"hf://datasets/{name}", tmp_path / "out", **options)["val"] > 0


def test_prepare_keeps_the_splits_and_goes_on_in_either(hub, tmp_path, tokenizer, monkeypatch):
    options: dict[str, Any] = {"tokenizer": tokenizer, "shard_tokens": 40}
    source = "hf://datasets/two/splits"
    prepare(source, tmp_path / "whole", **options)
    data = DataConfig(source=str(tmp_path / "whole"), tokenizer=str(tmp_path / "whole" / "tokenizer.json"))
    corpus = load_corpus(data, cache=tmp_path / "cache")
    assert corpus.tokenizer is not None
    for ids, held in ((corpus.train, [text for text in TEXTS if text != TEXTS[7]]), (corpus.validation, OWN)):
        assert corpus.tokenizer.decode(ids.tolist()).split("<|endoftext|>") == ["", *held]
    monkeypatch.setattr("deepdelta.data.prepare._AT_ONCE", 1)
    whole = Stream.__iter__
    for ends_at in (1, 2, 40):

        def cut(self: Stream, ends_at: int = ends_at) -> Any:
            for number, row in enumerate(whole(self)):
                if number == ends_at and (row["text"] in OWN) == (ends_at < 3):
                    raise OSError("the line is cut")
                yield row

        with monkeypatch.context() as patched:
            patched.setattr(Stream, "__iter__", cut)
            with pytest.raises(UserError, match="the line is cut"):
                prepare(source, tmp_path / f"{ends_at}", **options)
        prepare(source, tmp_path / f"{ends_at}", **options)
        files = [
            {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", f"{ends_at}")
        ]
        assert files[0] == files[1]


def test_the_recipe_names_public_things():
    recipe = RECIPES["fineweb-edu"]
    assert recipe.source == NAME and recipe.tokenizer == "hf://openai-community/gpt2"


@pytest.mark.usefixtures("unchecked")
def test_the_command_without_a_network(hub, tmp_path, capsys, tokenizer):
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "fineweb-edu", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "no tokenizer could be made of openai-community/gpt2" in said and "place its tokenizer.json" in said
    with pytest.raises(SystemExit):
        source = "hf://datasets/no/set/large:train"
        main(["prepare", source, "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer)])
    said = " ".join(capsys.readouterr().err.split())
    assert f"{source} cannot be read (FileNotFoundError: Couldn't reach no/set);" in said
    assert "place the Parquet files of the configuration large of that repository of the Hugging Face hub in a" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["prepare", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "prepare needs a tokenizer, or one of the sources that say theirs: fineweb-edu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://datasets/one", r"must be hf://datasets/OWNER/NAME\[@REVISION\].*, got 'hf://datasets/one'"),
        ("hf://a/b", r"must be hf://datasets/OWNER/NAME"),
        ("hf://datasets/a/b/c:train[5:]", r"must be hf://datasets/OWNER/NAME"),
    ],
)
def test_names_of_another_form_are_refused(hub, tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        load(source, tmp_path)
    assert not hub


def test_fields_are_named_and_must_be_text(hub, tmp_path):
    with pytest.raises(UserError, match=r"has no column 'body', but 'id', 'text'; name the one with the text by field"):
        load(NAME, tmp_path, field="body")
    with pytest.raises(UserError, match=r"row 0: 'id' must be text, got int; name another by field"):
        load(NAME, tmp_path, field="id")
    assert list(checked(iter([("a", None)]), "x", "y")) == []


def test_the_extra_is_named_where_it_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'need the extra .data., but the package datasets is absent: .*learning\[data\]"'
    ):
        load(NAME, tmp_path)


def saved(folder: Path, texts: list[str | None]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    data.save_to_disk(str(folder), num_shards=2)
    return data


@pytest.mark.home
@pytest.mark.compatible("train and prepare on a data set that datasets saved", "datasets")
def test_saved_data_sets(tmp_path, tokenizer):
    import datasets

    texts = [row["text"] for row in ROWS]
    data = saved(tmp_path / "one", texts)
    corpus = load(str(tmp_path / "one"), tmp_path / "cache")
    assert documents(corpus) == HELD
    splits = datasets.DatasetDict({"train": data, "test": data.select(range(9))})
    splits.save_to_disk(str(tmp_path / "two"))
    assert documents(load(str(tmp_path / "two"), tmp_path / "cache")) == HELD
    assert documents(load(str(tmp_path / "two" / "test"), tmp_path / "cache")) == set(TEXTS[:9]) - {TEXTS[7]}
    splits["validation"] = datasets.Dataset.from_dict({"text": OWN})
    splits.save_to_disk(str(tmp_path / "own"))
    own = load(str(tmp_path / "own"), tmp_path / "cache")
    assert parts(own) == ([text for text in texts if text is not None], OWN)
    assert "split as the data set itself is" in own.description
    by_train = load(str(tmp_path / "own" / "train"), tmp_path / "cache")
    assert documents(by_train) == HELD and by_train.sha256 != own.sha256
    prepare(tmp_path / "own", tmp_path / "shards", tokenizer=tokenizer)
    told = json.loads((tmp_path / "shards" / "prepared.json").read_text())
    assert [shard["tokens"] for shard in told["val"]] == [
        sum(len(BPETokenizer(tokenizer.read_text(), where="").encode(text)) + 1 for text in OWN)
    ]
    splits["validation"] = datasets.Dataset.from_dict({"text": ["another", *OWN]})
    splits.save_to_disk(str(tmp_path / "moved"))
    (tmp_path / "own" / "validation" / "data-00000-of-00001.arrow").write_bytes(
        (tmp_path / "moved" / "validation" / "data-00000-of-00001.arrow").read_bytes()
    )
    with pytest.raises(UserError, match="must stay as it was"):
        own.check_unchanged()
    again = load(str(tmp_path / "own"), tmp_path / "cache")
    assert parts(again)[1] == ["another", *OWN] and again.sha256 != own.sha256
    with pytest.raises(UserError, match="was begun with other files"):
        prepare(tmp_path / "own", tmp_path / "shards", tokenizer=tokenizer)
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(str(tmp_path / "three"))
    with pytest.raises(UserError, match=r"has no split 'train', but a, b: name one by its own folder"):
        load(str(tmp_path / "three"), tmp_path / "cache")
    sums = prepare(tmp_path / "one", tmp_path / "out", tokenizer=tokenizer, validation_fraction=0.2)
    told = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert told["finished"] and [name for name, _ in told["settings"]["files"]][:1] == ["data-00000-of-00002.arrow"]
    assert sum(sums.values()) == sum(len(BPETokenizer(tokenizer.read_text(), where="").encode(t)) + 1 for t in HELD)
    (tmp_path / "one" / "data-00000-of-00002.arrow").write_bytes(b"other")
    with pytest.raises(UserError, match="must stay as it was"):
        corpus.check_unchanged()


@pytest.mark.home
@pytest.mark.compatible("a data set of the hub streamed, load_dataset reading local Parquet in its place", "datasets")
def test_the_library_streams_parquet(tmp_path, monkeypatch):
    import datasets
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=11)
    own = datasets.load_dataset

    def local(path: str, name: str | None, **options: Any) -> Any:
        assert (path, name) == ("someone/texts", None) and options.pop("revision") == "main"
        files = {"train": str(tmp_path / "rows.parquet"), "validation": str(tmp_path / "own.parquet")}
        return own("parquet", data_files=files, **options)

    monkeypatch.setattr("deepdelta.data.hub.reachable", lambda address: False)
    monkeypatch.setattr(datasets, "load_dataset", local)
    pyarrow.parquet.write_table(pyarrow.table({"text": OWN}), tmp_path / "own.parquet")
    corpus = load("hf://datasets/someone/texts@main", tmp_path / "cache")
    assert parts(corpus) == ([text for text in TEXTS if text != TEXTS[7]], OWN)
    assert documents(load("hf://datasets/someone/texts@main:train", tmp_path / "cache")) == HELD
    short = load("hf://datasets/someone/texts@main:train[:20]", tmp_path / "cache")
    assert documents(short) == {*TEXTS[:7], *TEXTS[8:20]}


@pytest.mark.home
def test_a_data_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("deepdelta.data.hub.reachable", lambda address: False)
    with pytest.raises(
        UserError, match=r"hf://datasets/no-one/nothing cannot be read \(.*without a network, place the"
    ):
        load("hf://datasets/no-one/nothing", tmp_path)

"""Text in compressed files, JSON records and tables, and ids in shards: what comes out is what was put in."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deepdelta.data import Corpus, DataConfig, load_corpus
from deepdelta.errors import UserError

TEXTS = [f"document {i}: größe €{'x' * (i % 7)}\nand a second line" for i in range(60)]
TEXTS[11] = ""


def load(source: Path, **fields) -> Corpus:
    return load_corpus(DataConfig(source=str(source), **fields), cache=source.parent / "cache")


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def lines(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def table(path: Path, field: str = "text", values: list | None = None) -> Path:
    columns = {"id": list(range(60)), field: TEXTS if values is None else values}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def documents(corpus: Corpus) -> set[str]:
    parts = (bytes(split).split(b"\0") for split in (corpus.train, corpus.validation))
    return {part.decode() for split in parts for part in split}


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.NDJSON": lambda path: path.write_bytes(lines().replace(b"\n", b"\r\n\n")),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(lines())),
    "a.parquet": table,
}


@pytest.mark.parametrize("name", WRITERS)
def test_records_are_documents(tmp_path, name):
    WRITERS[name](tmp_path / name)
    corpus = load(tmp_path / name)
    assert documents(corpus) == set(TEXTS) - {""}
    assert (corpus.train_bytes or 0) + (corpus.validation_bytes or 0) == sum(len(text.encode()) for text in TEXTS)
    assert 2 <= bytes(corpus.validation).count(b"\0") + 1 <= 12
    assert "59 documents" in corpus.description or corpus.description.startswith(f"the records of {tmp_path / name}")
    again = load(tmp_path / name)
    assert again.sha256 == corpus.sha256 and np.array_equal(again.train, corpus.train)
    bpe = load(tmp_path / name, tokenizer="bpe", bpe_vocab_size=300)
    assert bpe.tokenizer is not None
    assert set(bpe.tokenizer.decode(bpe.train.tolist()).split("<|endoftext|>")) < set(TEXTS)
    corpus.check_unchanged()
    (tmp_path / name).write_bytes(b"other")
    with pytest.raises(UserError, match="must stay as it was"):
        corpus.check_unchanged()


def test_the_field_has_any_name_and_the_folder_any_files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.jsonl").write_bytes(lines("content"))
    table(folder / "two.parquet", "content", [f"row {i}" for i in range(60)])
    (folder / "three.txt").write_text("plain text")
    (folder / "four.txt.gz").write_bytes(gzip.compress(b"compressed text", mtime=0))
    (folder / "five.txt.zst").write_bytes(zstd(b"compressed otherwise"))
    corpus = load(folder, field="content")
    rows = {f"row {i}" for i in range(60)}
    others = {"plain text", "compressed text", "compressed otherwise"}
    assert documents(corpus) == (set(TEXTS) - {""}) | rows | others


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_a_compressed_text_is_the_text(tmp_path, suffix, pack):
    text = "some words and größe of them\n" * 3000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(text.encode()))
    plain, packed = load(tmp_path / "a.txt"), load(tmp_path / f"a.txt{suffix}")
    assert np.array_equal(plain.train, packed.train) and np.array_equal(plain.validation, packed.validation)
    assert plain.sha256 == packed.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines("body"), r"a.jsonl, line 1: there is no 'text', but the fields 'id', 'body'; name the one"),
        ("a.jsonl", lines() + b"[1]\n", "a.jsonl, line 61: there is no 'text', but list"),
        ("a.jsonl", lines() + b"{'a'}\n", "a.jsonl, line 61, must be one JSON record"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' must be text, got int"),
        ("a.jsonl", b'{"text": ""}\n', "must hold at least one record whose 'text' is not empty"),
        ("a.txt.gz", b"plain text", "a.txt.gz must be a file that gzip compressed"),
        ("a.jsonl.gz", gzip.compress(lines())[:-50], "a.jsonl.gz must be a file that gzip compressed"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "what '.*a.txt.gz' holds is empty"),
        ("a.txt.zst", b"plain text", "a.txt.zst must be a file that zstd compressed"),
        ("a.txt.gz", gzip.compress(b"a\0" * 99, mtime=0), "must be plain text, but byte 1 is NUL"),
        ("a.parquet", b"PAR1" + b"x" * 99 + b"PAR1", "a.parquet must be a Parquet file"),
    ],
)
def test_what_is_damaged_or_lacks_the_field_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_columns_are_named_and_must_be_text(tmp_path):
    table(tmp_path / "a.parquet", "body")
    with pytest.raises(
        UserError, match=r"a.parquet has no column 'text', but 'id', 'body'; name the one with the text"
    ):
        load(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 0: 'id' must be text, got int"):
        load(tmp_path / "a.parquet", field="id")


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_the_extra_is_named_where_it_is_absent(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need the extra 'data', but the package pyarrow is absent"):
        load(tmp_path / name)


# Ids


def llm_c(ids: np.ndarray) -> bytes:
    header = np.zeros(256, np.int32)
    header[:3] = {2: 20240520, 4: 20240801}[ids.dtype.itemsize], 1, len(ids)
    return header.tobytes() + ids.tobytes()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("header", [False, True])
def test_ids_of_two_widths_with_a_header_and_without(tmp_path, dtype, header):
    ids = np.random.default_rng(0).integers(0, 60000 if dtype == "<u2" else 200000, 1000).astype(dtype)
    path = tmp_path / "a.bin"
    path.write_bytes(llm_c(ids) if header else ids.tobytes())
    options = {"bin_vocab_size": 65536} if dtype == "<u2" else {"bin_dtype": "uint32", "bin_vocab_size": 200000}
    corpus = load(path, **options)
    assert np.array_equal(corpus.train, ids[:900]) and np.array_equal(corpus.validation, ids[900:])
    with pytest.raises(UserError, match="below the vocabulary size of 50,000; position"):
        load(path, **options | {"bin_vocab_size": 50000})
    if header:
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(UserError, match=r"announces 1,000 ids of \d bytes each, and holds .* It is cut off"):
            load(path, **options)


def test_shards_are_joined_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    parts = {f"fineweb_train_{i:06d}.bin": np.arange(1000 * i, 1000 * i + 300, dtype="<u2") for i in (2, 0, 1)}
    parts |= {"fineweb_val_000000.bin": np.arange(77, dtype="<u2")}
    for name, ids in parts.items():
        (folder / name).write_bytes(llm_c(ids) if "val" in name else ids.tobytes())
    corpus = load(folder)
    expected = np.concatenate([parts[f"fineweb_train_{i:06d}.bin"] for i in range(3)])
    assert np.array_equal(corpus.train, expected) and np.array_equal(corpus.validation, np.arange(77))
    assert "3 training" not in corpus.description and "4 files" in corpus.description
    (folder / "fineweb_train_000003.bin").write_bytes(llm_c(np.arange(9, dtype="<u4")))
    with pytest.raises(UserError, match=r"one width; fineweb_train_000000.bin holds uint16, fineweb_train_000003.bin"):
        load(folder)
    for file in folder.glob("*train*"):
        file.unlink()
    with pytest.raises(UserError, match=r"both splits; .* holds validation shards only, and none called train_"):
        load(folder)

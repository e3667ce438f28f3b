"""What is no text, and no row of ids, is refused by name before anything is trained on it."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deepdelta.data import DataConfig, load_corpus
from deepdelta.errors import UserError

TEXT = "some words and more of them\n" * 50
RECORDS = "".join(json.dumps({"id": i, "text": f"text {i}"}) + "\n" for i in range(50))


def refused(source: Path, message: str, cache: Path, **fields: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(DataConfig(source=str(source), **fields), cache=cache)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not cache.exists()


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", TEXT)


def tape(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(TEXT)
        file.addfile(entry, io.BytesIO(TEXT.encode()))


def database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("create table texts (text)")
    connection.commit()
    connection.close()


WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tgz": (lambda path: path.write_bytes(gzip.compress(TEXT.encode())), "is compressed: decompress it"),
    "bz2": (lambda path: path.write_bytes(bz2.compress(TEXT.encode())), "is compressed: decompress it"),
    "xz": (lambda path: path.write_bytes(lzma.compress(TEXT.encode())), "is compressed: decompress it"),
    "zstd": (
        lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 99),
        r"is compressed: decompress it \(zstd -d\), or let its name end in .zst",
    ),
    "zip": (archive, "is an archive: unpack it"),
    "tar": (tape, "is an archive: unpack it"),
    "pkl": (lambda path: path.write_bytes(pickle.dumps([TEXT])), "holds pickled objects"),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY" + b"x" * 99), r"is an array of numpy: .*astype\('uint16'\)"),
    "safetensors": (lambda path: save_file({"a": torch.ones(9)}, path), "holds weights"),
    "sqlite": (database, "is a database"),
    "arrow": (lambda path: path.write_bytes(b"ARROW1" + b"x" * 99), "is a table: write its text"),
    "pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n" + b"x" * 99), "is a PDF: extract its text"),
    "png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 99), "is an image"),
}


@pytest.mark.parametrize("named", [True, False], ids=["by its name", "by its content"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_refused_alone_and_in_a_folder(tmp_path: Path, suffix: str, named: bool) -> None:
    write, message = WRITERS[suffix]
    folder, cache = tmp_path / "text", tmp_path / "cache"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"{i} {TEXT}")
    if named:  # the name alone is enough, in capitals too
        path = folder / f"a.{suffix.upper()}"
        path.write_text(TEXT)
    else:
        path = folder / "a.dat"
        write(path)
    refused(path, rf"a\.\w+ must be plain text, but {message}", cache)
    refused(folder, rf"a\.\w+ must be plain text, but {message}.* or leave it out by another pattern than", cache)
    corpus = load_corpus(DataConfig(source=str(folder), pattern="**/*.txt"), cache=cache)
    assert corpus.train_bytes and corpus.train_bytes > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RECORDS.encode(), r"is JSON, one record a line: let its name end in .jsonl, and name the field"),
        (b"PAR1" + b"x" * 99 + b"PAR1", "is a Parquet file: let its name end in .parquet"),
        (b"some text\0" + b"x" * 99, "byte 9 is NUL, which text does not hold"),
        ("some text ".encode("utf-16") * 9, "is UTF-16 or UTF-32: convert it to UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "stands for a file that Git LFS keeps"),
        (b'[{"text": "one record of a large list"}, ' + b"x" * 9999, "is JSON, one record a line"),
    ],
)
def test_other_files_that_are_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    refused(tmp_path / "a.txt", message, tmp_path / "cache")


@pytest.mark.parametrize(
    "text",
    ["{\n" + '"name": "some settings",\n' * 50 + "}", "PK is how zip files begin\n" * 9, "größe \xa0 \x1b[0m \f\n" * 9],
)
def test_text_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert load_corpus(DataConfig(source=str(tmp_path / "a.json"))).train_bytes
    (tmp_path / "code.jl").write_text("f(x) = 2x  # Julia, not JSON lines\n" * 9)
    assert load_corpus(DataConfig(source=str(tmp_path / "code.jl"))).train_bytes
    (tmp_path / "latin.txt").write_bytes("größe\n".encode("latin-1") * 99)
    assert load_corpus(DataConfig(source=str(tmp_path / "latin.txt"))).train_bytes


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
@pytest.mark.parametrize("most", [256, 50257, 200000])
def test_wider_ids_are_named(tmp_path: Path, dtype: str, most: int) -> None:
    ids = np.random.default_rng(0).integers(0, most, 5000).astype(dtype)
    ids.tofile(tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "every second number is near 0, as where ids are uint32 or wider", tmp_path / "cache")
    folder = tmp_path / "ids"
    folder.mkdir()
    ids.tofile(folder / "val.bin")
    np.arange(100, dtype="<u2").tofile(folder / "train.bin")
    refused(folder, "val.bin must hold uint16 ids .* uint32 or wider", tmp_path / "cache")


@pytest.mark.parametrize("most", [2, 4, 5, 97, 50257])
def test_narrow_ids_are_not_taken_for_wide_ones(tmp_path: Path, most: int) -> None:
    ids = np.random.default_rng(0).integers(0, most, 5000).astype("<u2")
    ids[0] = 0x8B1F % most  # the first id may begin as a gzip file does
    ids.tofile(tmp_path / "a.bin")
    corpus = load_corpus(DataConfig(source=str(tmp_path / "a.bin")))
    assert np.array_equal(corpus.train, ids[:4500])


def test_an_array_saved_by_numpy_is_no_row_of_ids(tmp_path: Path) -> None:
    with (tmp_path / "a.bin").open("wb") as file:
        np.save(file, np.arange(1000, dtype="<u2"))
    refused(tmp_path / "a.bin", r"is an array of numpy: write ids by numpy as array.astype", tmp_path / "cache")
    torch.save(torch.arange(9), tmp_path / "pytorch_model.bin")
    refused(tmp_path / "pytorch_model.bin", "must hold uint16 ids .*, but is an archive", tmp_path / "cache")

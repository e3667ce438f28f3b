"""Bad input: every message of the data room, and nothing half-written after it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from deepdelta.config import from_plain, to_plain
from deepdelta.data import DataConfig, check_context, documents, load_corpus
from deepdelta.data.sources import list_source
from deepdelta.errors import UserError


def refused(message: str, source: Path | str, cache: Path, **fields: object) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(DataConfig(source=str(source), **fields), cache=cache)  # type: ignore[arg-type]
    for _, folders, names in os.walk(cache):
        assert not names and set(folders) <= {"tokens"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": ""}, "source must not be empty"),
        ({"pattern": ""}, "pattern must not be empty"),
        ({"tokenizer": ""}, "tokenizer must not be empty"),
        ({"pattern": "/etc/*"}, "pattern must stay inside the folder"),
        ({"pattern": "../*"}, "pattern must stay inside the folder"),
        ({"bpe_vocab_size": 256}, "bpe_vocab_size must be at least 257 .*got 256"),
        ({"bin_vocab_size": 1}, "bin_vocab_size must lie in 2 to 65536 .*got 1"),
        ({"bin_vocab_size": 65537}, "bin_vocab_size must lie in 2 to 65536 .*got 65537"),
        ({"validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1, got 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1, got 1.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction must lie between 0 and 1, got nan"),
    ],
)
def test_configuration(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)  # type: ignore[arg-type]


def test_configuration_is_plain_data() -> None:
    config = DataConfig(source="a.txt", tokenizer="bpe")
    assert from_plain(DataConfig, to_plain(config)) == config
    with pytest.raises(UserError, match="unknown key 'sauce'; did you mean 'source'"):
        from_plain(DataConfig, {"sauce": "a"})


def test_source_that_is_missing_or_empty(tmp_path: Path) -> None:
    refused("there is nothing at 'no/such/text'", "no/such/text", tmp_path / "c")
    refused(r"there is nothing at 'a\\x00b'", "a\0b", tmp_path / "c")
    (tmp_path / "empty").touch()
    refused("empty' is not", tmp_path / "empty", tmp_path / "c")
    (tmp_path / "tiny").write_bytes(b"x")
    refused("tiny with its 1 bytes is too short to hold out 10%", tmp_path / "tiny", tmp_path / "c")
    (tmp_path / "one character").write_text("€")
    refused("too short to hold out 10%", tmp_path / "one character", tmp_path / "c")
    refused("must be a file with something in it or a folder; '/dev/null' is not", "/dev/null", tmp_path / "c")


def test_folder_without_documents_or_with_too_few(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    refused(r"at least one non-empty file that matches '\*\*/\*'; none does", folder, tmp_path / "c")
    (folder / "empty").touch()
    (folder / ".hidden").write_text("x")
    refused(r"none does", folder, tmp_path / "c")
    (folder / "a").write_text("some text")
    refused(r"matches '\*\.py'; none does", folder, tmp_path / "c", pattern="*.py")
    refused(
        r"holding out about 10% of the bytes by whole documents would leave the validation split empty, with 1 of",
        folder,
        tmp_path / "c",
    )
    refused(r"leave the training split empty", folder, tmp_path / "c", validation_fraction=0.9)


@pytest.mark.parametrize("offset", [3, documents.CHUNK - 1, documents.CHUNK + 5])
def test_text_that_is_not_utf8(tmp_path: Path, offset: int) -> None:
    text = bytearray(b"abcdefg\n" * (documents.CHUNK // 4))
    text[offset : offset + 2] = b"\xe2\x82"  # the third byte of the character is missing
    (tmp_path / "a.txt").write_bytes(text)
    message = rf"a.txt must be UTF-8 to be split into BPE tokens; byte {offset:,} is not"
    refused(message, tmp_path / "a.txt", tmp_path / "c", tokenizer="bpe")
    assert load_corpus(DataConfig(source=str(tmp_path / "a.txt"))).vocab_size == 256  # bytes are fine


def test_text_that_ends_inside_a_character(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(f"{i} ".encode() * 9 + b"\xe2\x82")
    refused(r"\d+.txt must be UTF-8 .* byte (18|27) is not", tmp_path, tmp_path.parent / "c", tokenizer="bpe")


def test_token_files(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.bin", tmp_path / "c"
    path.write_bytes(b"x" * 1001)
    refused(r"a.bin must hold uint16 ids of 2 bytes each; its length of 1,001 bytes is odd", path, cache)
    ids = np.zeros(documents.CHUNK, "<u2")  # two chunks
    ids[[documents.CHUNK // 2 + 7, -1]] = 50304, 60000
    ids.tofile(path)
    refused(
        r"below the vocabulary size of 50,304; position 524,295 holds 50,304. Set bin_vocab_size to at", path, cache
    )
    ids[documents.CHUNK // 2 + 7] = 0
    ids.tofile(path)  # the bad id lies in the validation split: its position is still the file's
    refused(r"position 1,048,575 holds 60,000. Set bin_vocab_size to at least 60,001", path, cache)
    refused(r"a BPE cannot be trained on ids", path, cache, tokenizer="bpe")
    path.touch()
    path.write_bytes(b"")
    refused(r"a.bin' is not", path, cache)


def test_folder_of_token_files(tmp_path: Path) -> None:
    folder, cache = tmp_path / "ids", tmp_path / "c"
    folder.mkdir()
    np.zeros(4, "<u2").tofile(folder / "train.bin")
    refused(r"must hold train.bin and val.bin; .*ids holds train.bin only", folder, cache)
    (folder / "val.bin").touch()
    refused(r"val.bin must hold uint16 ids; it is empty", folder, cache)
    (folder / "val.bin").write_bytes(b"abc")
    refused(r"val.bin must hold uint16 ids .* 3 bytes is odd", folder, cache)
    np.array([0, 7], "<u2").tofile(folder / "val.bin")
    refused(r"val.bin: every id must be below .* of 7; position 1 holds 7", folder, cache, bin_vocab_size=7)


def test_unknown_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 9)
    refused("no file 'byte'; did you mean 'bytes'", tmp_path / "a.txt", tmp_path / "c", tokenizer="byte")
    refused("no file 'gpt2'; known are: bpe, bytes", tmp_path / "a.txt", tmp_path / "c", tokenizer="gpt2")
    (tmp_path / "t.json").write_text("[]")
    refused("t.json must be a JSON file that", tmp_path / "a.txt", tmp_path / "c", tokenizer=str(tmp_path / "t.json"))


@pytest.mark.parametrize("size", [20, 40])
def test_context_longer_than_a_split(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * size)
    corpus = load_corpus(DataConfig(source=str(tmp_path / "a.txt"), validation_fraction=0.5))
    check_context(corpus, size // 2 - 1)
    with pytest.raises(UserError, match=rf"it is {size // 2} and the training split has {size // 2}\."):
        check_context(corpus, size // 2)
    corpus = load_corpus(DataConfig(source=str(tmp_path / "a.txt")))
    with pytest.raises(UserError, match=rf"it is {size // 10} and the validation split has {size // 10}\."):
        check_context(corpus, size // 10)


def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    (folder / "a" / "b").mkdir(parents=True)
    for i in range(20):
        (folder / "a" / "b" / f"{i}.txt").write_text(f"{i} some text")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "more.txt").write_text("linked text")
    (folder / "linked").symlink_to(elsewhere)  # a link to another folder is followed
    corpus = load_corpus(DataConfig(source=str(folder)), cache=tmp_path / "cache")
    assert b"linked text" in corpus.train.tobytes() + corpus.validation.tobytes()

    up = folder / "a" / "b" / "up"
    up.symlink_to(folder / "a")
    refused(r"the link .*up leads to a folder that contains it", folder, tmp_path / "c")
    up.unlink()
    (elsewhere / "back").symlink_to(folder)  # the loop closes outside
    refused(r"the link .*linked/back leads to a folder that contains it", folder, tmp_path / "c")
    (elsewhere / "back").unlink()
    (folder / "self").symlink_to("self")
    refused(r"self cannot be read: .*[lL]inks", folder, tmp_path / "c")
    refused(r"self cannot be read: .*[lL]inks", folder / "self", tmp_path / "c")
    (folder / "self").unlink()
    (folder / "nowhere").symlink_to("not there")
    refused(r"nowhere cannot be read: No such file", folder, tmp_path / "c")


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of a user whom permissions bind, as whom the block runs."""
    with tempfile.TemporaryDirectory() as name:
        place, user = Path(name), os.geteuid()
        if user == 0:
            os.chown(place, 65534, -1)
            os.seteuid(65534)
        try:
            yield place
        finally:
            os.seteuid(user)


def test_names_that_are_too_long(tmp_path: Path) -> None:
    long = "x" * 300
    (tmp_path / "a.txt").write_text("some text " * 9)
    refused("(cannot be read: File name too long|there is nothing at)", tmp_path / long, tmp_path / "c")
    refused("(cannot be read: File name too long|there is no file)", tmp_path / "a.txt", tmp_path / "c", tokenizer=long)
    with pytest.raises(UserError, match=r"the cache folder .* must be writable; it says: File name too long"):
        load_corpus(DataConfig(source=str(tmp_path / "a.txt"), tokenizer="bpe"), cache=tmp_path / long)


def test_unreadable() -> None:
    with unprivileged() as place:
        folder = place / "text"
        folder.mkdir()
        for i in range(20):
            (folder / f"{i}.txt").write_text(f"{i} some text")
        shut = folder / "7.txt"
        shut.chmod(0)
        refused(r"7.txt cannot be read: Permission denied", folder, place / "c")
        refused(r"7.txt cannot be read: Permission denied", shut, place / "c")
        shut.chmod(0o600)
        (folder / "inner").mkdir(0)
        refused(r"inner cannot be read: Permission denied", folder, place / "c")
        refused(r"inner cannot be read: Permission denied", folder / "inner", place / "c", pattern="*")
        # Folders that a pattern leads into, which glob would pass over; and no others.
        refused(r"inner cannot be read: Permission denied", folder, place / "c", pattern="*/*.txt")
        refused(r"inner cannot be read: Permission denied", folder, place / "c", pattern="in*/**/*.txt")
        refused(r"matches 'out\*/\*.txt'; none does", folder, place / "c", pattern="out*/*.txt")
        assert len(list_source(DataConfig(source=str(folder), pattern="*.txt")).documents) == 20
        (folder / "inner").rmdir()
        (place / "shut").mkdir(0)
        refused(r"shut/a cannot be read: Permission denied", place / "shut" / "a", place / "c")
        tokenizer = {"tokenizer": str(place / "shut" / "t.json")}
        refused(r"t.json cannot be read: Permission denied", folder, place / "c", **tokenizer)
        with pytest.raises(UserError, match=r"cache folder .*shut/c must be writable; it says: Permission denied"):
            load_corpus(DataConfig(source=str(folder)), cache=place / "shut" / "c")
        (place / "c").mkdir(0o500, exist_ok=True)
        (place / "c").chmod(0o500)
        refused(r"cache folder .* must be writable; it says: Permission denied", folder, place / "c")
        (place / "c").chmod(0o700)

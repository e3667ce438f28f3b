"""Files, folders and token files: splits, hashes, memory maps, and what the BPE may see."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdelta.data import Corpus, DataConfig, load_corpus
from deepdelta.data.documents import Document
from deepdelta.data.sources import Listing, split_by_group


@pytest.fixture
def load(tmp_path: Path):  # type: ignore[no-untyped-def]
    def loader(source: Path, **fields: object) -> Corpus:
        return load_corpus(DataConfig(source=str(source), **fields), cache=tmp_path / "cache")  # type: ignore[arg-type]

    return loader


def folder_of(place: Path, documents: dict[str, bytes]) -> Path:
    for name, content in documents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


MANY = {f"part{i % 3}/{i}.txt": f"document {i} ".encode() * 20 for i in range(40)}


def test_text_file_is_mapped_where_it_lies_and_split_at_the_last_tenth(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    content = bytes(range(1, 256)) * 4  # any bytes but NUL are fine at byte level
    (tmp_path / "text.txt").write_bytes(content)
    corpus = load(tmp_path / "text.txt")
    assert corpus.train.tobytes() == content[:918] and corpus.validation.tobytes() == content[918:]
    for tokens in (corpus.train, corpus.validation):
        assert isinstance(tokens, np.memmap) and Path(tokens.filename) == tmp_path / "text.txt"
    assert not (tmp_path / "cache").exists()
    assert "text.txt: 1 document, 1,020 bytes; 918 training and 102 validation tokens" in corpus.description


@given(text=st.text(alphabet="aé€😀", min_size=20, max_size=40))
def test_no_character_is_cut_in_two(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text, encoding="utf-8")
    corpus = load_corpus(DataConfig(source=str(path), validation_fraction=0.3))
    assert corpus.train.tobytes().decode() + corpus.validation.tobytes().decode() == text
    assert 0 <= len(corpus.train) - int(len(text.encode()) * 0.7) <= 3


def test_bytes_and_bpe_hold_out_the_same_text(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    text = "größe 日本語 €\n\n  and so on. " * 400
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    plain, bpe = load(tmp_path / "a.txt"), load(tmp_path / "a.txt", tokenizer="bpe", bpe_vocab_size=300)
    assert bpe.sha256 == plain.sha256 and bpe.train_bytes == len(plain.train)
    for split in ("train", "validation"):
        assert bpe.tokenizer.decode(getattr(bpe, split).tolist()).encode() == getattr(plain, split).tobytes()
    assert bpe.tokenizer.separator not in bpe.train


@settings(max_examples=30, deadline=None)
@given(chunk=st.integers(1, 9), text=st.text(alphabet="aé€😀\n", max_size=30))
def test_text_read_in_small_chunks_is_the_same_text(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, text: str
) -> None:
    from deepdelta.data import documents

    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    document = Document(name="a", group="a", path=path, start=0, stop=len(text.encode()), modified_ns=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK", chunk)
        pieces = list(documents.texts(document))
        digest = documents.digest(document)
    assert "".join(pieces) == text and all(pieces)
    assert digest == hashlib.sha256(text.encode()).hexdigest()


def test_bpe_is_trained_on_the_training_split_only(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    tokenizers = []
    for name, end in (("one", "zqzqzq"), ("two", "xkxkxk")):
        (tmp_path / name).write_text("some words " * 900 + (end + " ") * 157)
        corpus = load(tmp_path / name, tokenizer="bpe", bpe_vocab_size=400)
        assert end.encode() in load(tmp_path / name).validation.tobytes()
        assert end.encode() not in load(tmp_path / name).train.tobytes()
        assert len(corpus.tokenizer.encode(end)) == len(end) and len(corpus.tokenizer.encode(" words")) == 1
        corpus.tokenizer.save(tmp_path)
        tokenizers.append((tmp_path / "tokenizer.json").read_text())
    assert tokenizers[0] == tokenizers[1]


def test_folder_is_split_by_whole_documents_joined_by_separators(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    odd = {".hidden": b"no", ".git/x": b"no", "empty": b"", "part0/copy.txt": MANY["part0/0.txt"]}
    corpus = load(folder_of(tmp_path / "text", MANY | odd))
    splits = [split.tobytes().split(b"\0") for split in (corpus.train, corpus.validation)]
    assert sorted(splits[0] + splits[1]) == sorted(MANY.values())  # each once: hidden, empty and copied ones are out
    assert 2 <= len(splits[1]) <= 6
    assert corpus.train_bytes + corpus.validation_bytes == sum(map(len, MANY.values()))
    assert "40 documents" in corpus.description and "split by document" in corpus.description
    bpe = load(tmp_path / "text", tokenizer="bpe", bpe_vocab_size=300)
    assert bpe.tokenizer.decode(bpe.validation.tolist()).encode().split(b"<|endoftext|>") == splits[1]


def test_pattern_chooses_documents(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "text", MANY | {"x.bin": b"\0\1\2"})
    corpus = load(folder, pattern="part1/*.txt", validation_fraction=0.3)
    held = corpus.train.tobytes().split(b"\0") + corpus.validation.tobytes().split(b"\0")
    assert sorted(held) == sorted(content for name, content in MANY.items() if name.startswith("part1/"))


@given(sizes=st.lists(st.integers(1, 50), min_size=30, max_size=80), fraction=st.floats(0.05, 0.5))
def test_share_held_out_is_near_the_fraction_and_groups_stay_whole(sizes: list[int], fraction: float) -> None:
    documents = [
        Document(name=str(i), group=f"g{i % 29}", path=Path(str(i)), start=0, stop=size, modified_ns=0)
        for i, size in enumerate(sizes)
    ]
    listing = Listing(title="t", documents=documents, split_by="document")
    train, validation = split_by_group(documents, fraction, listing)
    assert sorted(train + validation, key=lambda d: int(d.name)) == documents
    assert not {d.group for d in train} & {d.group for d in validation}
    groups: dict[str, int] = {}
    for document in documents:
        groups[document.group] = groups.get(document.group, 0) + document.size
    held = sum(d.size for d in validation)
    # What is missing or too much is at most half the largest group: otherwise another group would fit.
    assert abs(held - fraction * sum(sizes)) <= max(groups.values()) / 2
    # The walk follows the SHA-256 of the names, so the first group in that order is held out if it fits at all.
    first = min(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert (first in {d.group for d in validation}) == (groups[first] < 2 * fraction * sum(sizes))


def test_hash_tells_content_names_and_split_apart_and_nothing_else(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    base = load(folder_of(tmp_path / "a", MANY)).sha256
    moved = load(folder_of(tmp_path / "deep" / "b", MANY)).sha256
    changed = load(folder_of(tmp_path / "c", MANY | {"part0/0.txt": b"other"})).sha256
    renamed = load(folder_of(tmp_path / "d", {("x" + k if k == "part0/0.txt" else k): v for k, v in MANY.items()}))
    resplit = load(tmp_path / "a", validation_fraction=0.4).sha256
    assert moved == base
    assert len({base, changed, renamed.sha256, resplit}) == 4


def test_hash_is_the_documented_one(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    head, tail = hashlib.sha256(b"012345678").hexdigest(), hashlib.sha256(b"9").hexdigest()
    expected = hashlib.sha256(f'["train", "text", "{head}"]\n["validation", "text", "{tail}"]\n'.encode()).hexdigest()
    assert load(tmp_path / "a.txt").sha256 == expected


def test_token_file_is_split_by_position(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    ids = np.arange(1001, dtype="<u2")
    ids.tofile(tmp_path / "ids.bin")
    corpus = load(tmp_path / "ids.bin", bin_vocab_size=1001)
    assert corpus.train.tolist() == list(range(900)) and corpus.validation.tolist() == list(range(900, 1001))
    assert isinstance(corpus.train, np.memmap) and corpus.tokenizer is None and corpus.train_bytes is None
    assert corpus.vocab_size == 1001 and load(tmp_path / "ids.bin").vocab_size == 50304
    assert load(tmp_path / "ids.bin", validation_fraction=0.2).sha256 != corpus.sha256


def test_folder_of_token_files_is_taken_as_it_is(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    np.array([1, 2, 3], "<u2").tofile(tmp_path / "train.bin")
    np.array([4, 500], "<u2").tofile(tmp_path / "val.bin")
    corpus = load(tmp_path)
    assert corpus.train.tolist() == [1, 2, 3] and corpus.validation.tolist() == [4, 500]
    assert corpus.description.endswith("split by file") and "2 files" in corpus.description


def test_token_files_with_their_tokenizer(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.txt").write_text("some words and more " * 50)
    text = load(tmp_path / "a.txt", tokenizer="bpe", bpe_vocab_size=280)
    text.tokenizer.save(tmp_path)
    np.asarray(text.train).tofile(tmp_path / "ids.bin")
    corpus = load(tmp_path / "ids.bin", tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.vocab_size == text.vocab_size
    assert corpus.tokenizer.decode(corpus.train.tolist()) == text.tokenizer.decode(
        text.train[: len(corpus.train)].tolist()
    )
    again = load(tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    assert np.array_equal(again.train, text.train)


def test_a_vocabulary_above_16_bits_is_held_in_32(tmp_path: Path, load) -> None:  # type: ignore[no-untyped-def]
    import tokenizers

    vocabulary = {"<|endoftext|>": 0, "b": 65536} | {f"w{i}": i for i in range(1, 65536)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("b " * 20)
    corpus = load(tmp_path / "a.txt", tokenizer=str(tmp_path / "words.json"))
    assert corpus.train.dtype == np.uint32 and corpus.train.tolist() == [65536] * 18 and corpus.vocab_size == 65537


def test_size_costs_no_memory(tmp_path: Path) -> None:
    """20 GiB mapped and 256 MiB hashed and checked, within 32 MiB more of resident memory."""
    code = f"""
import os, resource, sys
from pathlib import Path
import deepdelta.data.corpus as corpus
from deepdelta.data import DataConfig, batch, load_corpus
place = Path({str(tmp_path)!r})
for name, size in (("real.txt", 1 << 28), ("real.bin", 1 << 28), ("huge.txt", 20 << 30)):
    with (place / name).open("wb") as file:
        file.write(b"some text" * 1000)  # text by its beginning; the rest is a hole of zeros
        file.truncate(size)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform == "linux" else 1024)
before = peak()
for name in ("real.txt", "real.bin"):
    load_corpus(DataConfig(source=str(place / name)), cache=place / "cache")
corpus.digest = lambda document, count: "hashing 20 GiB takes too long for a test"
huge = load_corpus(DataConfig(source=str(place / "huge.txt")), cache=place / "cache")
assert len(huge.train) + len(huge.validation) == 20 << 30
x, y = batch(huge.train, seed=0, step=0, batch_size=8, context=64)
assert x.sum() == 0 and x.shape == (8, 64)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 32 * 1024  # KiB

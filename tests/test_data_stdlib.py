"""The default corpus: the real standard library of the interpreter that runs the tests."""

import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from deepdelta.data import Corpus, DataConfig, load_corpus
from deepdelta.errors import UserError

ROOT = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "idlelib", "lib2to3"}
LEFT_OUT |= {"site-packages", "dist-packages", "lib-dynload", "_bundled", "__pycache__"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> Corpus:
    return load_corpus(DataConfig(), cache=cache)


def documents(tokens: np.ndarray) -> list[bytes]:
    """The corpus's documents, taken apart at the NUL bytes between them."""
    return tokens.tobytes().split(b"\0")


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def listed() -> dict[bytes, list[Path]]:
    """Contents to the files that have them, found by os.walk."""
    found: dict[bytes, list[Path]] = {}
    for here, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize")):
                path = Path(here, name)
                found.setdefault(path.read_bytes(), []).append(path)
    del found[b""]
    return found


def test_holds_each_file_once_and_no_module_on_both_sides(corpus: Corpus) -> None:
    found = listed()
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert len(train) + len(validation) == len(found)
    assert set(train) | set(validation) == set(found)
    assert not set(train) & set(validation)
    # A content that several files share stands for the first of them.
    modules = [{module_of(min(found[content])) for content in split} for split in (train, validation)]
    assert not modules[0] & modules[1]
    assert {"asyncio", "email", "typing"} <= modules[0] | modules[1]


def test_is_real_in_size_and_holds_out_a_tenth(corpus: Corpus) -> None:
    assert corpus.train_bytes is not None and corpus.validation_bytes is not None
    assert 5e6 < corpus.train_bytes + corpus.validation_bytes < 2e7
    assert 0.09 < corpus.validation_bytes / (corpus.train_bytes + corpus.validation_bytes) < 0.11
    assert corpus.vocab_size == 256 and corpus.train.dtype == np.uint8
    assert corpus.train_bytes == len(corpus.train) - (len(documents(corpus.train)) - 1)


def test_left_out_parts_are_out(corpus: Corpus) -> None:
    both = set(documents(corpus.train)) | set(documents(corpus.validation))
    for name in ("encodings/utf_8.py", "pydoc_data/topics.py", "test/test_re.py"):
        if (path := ROOT / name).exists():
            assert path.read_bytes() not in both
    assert (ROOT / "argparse.py").read_bytes() in both


def test_loads_the_same_again_without_encoding(corpus: Corpus, cache: Path) -> None:
    said: list[str] = []
    again = load_corpus(DataConfig(), cache=cache, progress=said.append)
    assert again.sha256 == corpus.sha256 and again.description == corpus.description
    assert np.array_equal(again.train, corpus.train) and np.array_equal(again.validation, corpus.validation)
    assert not [line for line in said if line.startswith("Encoding")]
    assert "standard library" in corpus.description and corpus.description.endswith("split by top-level module")


def test_is_text_that_a_bpe_can_read(corpus: Corpus) -> None:
    for tokens in (corpus.train, corpus.validation):
        assert "import" in tokens.tobytes().decode("utf-8", errors="strict")


def test_a_library_without_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path, tmp_path / "python311.zip"):
        monkeypatch.setattr(sysconfig, "get_path", lambda name, place=place: str(place))
        with pytest.raises(UserError, match=r"must lie at .*, and it does not \(it may be zipped"):
            load_corpus(DataConfig(), cache=tmp_path / "cache")

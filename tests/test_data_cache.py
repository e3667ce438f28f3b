"""The cache: where it lies, what it remembers, that it is built once and whole."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from deepdelta.data import DataConfig, cache, corpus, default_cache, load_corpus
from deepdelta.data.cache import built_once
from deepdelta.errors import UserError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} " * 30)
    return folder


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEEPDELTA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "platform", "linux")
    assert default_cache() == Path("/home/someone/.cache/deepdelta")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache() == Path("/home/someone/.cache/deepdelta")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert default_cache() == Path("/var/xdg/deepdelta")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_cache() == Path("/home/someone/Library/Caches/deepdelta")
    monkeypatch.setenv("DEEPDELTA_CACHE", "/elsewhere")
    assert default_cache() == Path("/elsewhere")


def test_default_place_is_used(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPDELTA_CACHE", str(tmp_path / "mine"))
    tokens = load_corpus(DataConfig(source=str(text))).train
    assert isinstance(tokens, np.memmap) and Path(tokens.filename).is_relative_to(tmp_path / "mine")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_encoded_once_then_mapped(text: Path, tmp_path: Path, tokenizer: str) -> None:
    config = DataConfig(source=str(text), tokenizer=tokenizer, bpe_vocab_size=300)
    said: list[list[str]] = [[], [], []]
    first = load_corpus(config, cache=tmp_path / "cache", progress=said[0].append)
    second = load_corpus(config, cache=tmp_path / "cache", progress=said[1].append)
    assert [line.split(":")[0] for line in said[0] if line.startswith("Encoding")] == [
        "Encoding the train split",
        "Encoding the validation split",
    ]
    assert not [line for line in said[1] if line.startswith(("Encoding", "Training"))]
    assert np.array_equal(first.train, second.train) and first.vocab_size == second.vocab_size
    (text / "0.txt").write_text("something else")
    load_corpus(config, cache=tmp_path / "cache", progress=said[2].append)
    assert [line for line in said[2] if line.startswith("Encoding")]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_another_tokenizer_is_another_entry(text: Path, tmp_path: Path) -> None:
    fields: list[dict[str, object]] = [{}, {"tokenizer": "bpe"}, {"tokenizer": "bpe", "bpe_vocab_size": 280}]
    sizes = [load_corpus(DataConfig(source=str(text), **f), cache=tmp_path / "c").vocab_size for f in fields]  # type: ignore[arg-type]
    assert sizes[0] == 256 and sizes[2] == 280 and sizes[1] > 280
    assert len(list((tmp_path / "c" / "tokens").iterdir())) == 3


def test_two_threads_building_at_once_share_one_result(tmp_path: Path) -> None:
    both_build = threading.Barrier(2, timeout=600)
    found: list[Path] = []

    def work(name: str) -> None:
        def build(folder: Path) -> None:
            (folder / "who").write_text(name)
            both_build.wait()

        found.append(built_once(tmp_path, "key", build))

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "tokens" / "key-2"] * 2
    assert (found[0] / "who").read_text() in ("a", "b")
    assert os.listdir(tmp_path / "tokens") == ["key-2"]


def test_processes_loading_at_once_all_succeed(text: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from deepdelta.data import DataConfig, load_corpus\n"
        "place = Path(sys.argv[1]); print('ready', flush=True); sys.stdin.read()\n"
        "c = load_corpus(DataConfig(source=str(place / 'text'), tokenizer='bpe'), cache=place / 'cache')\n"
        "print(c.sha256, int(c.train.astype('int64').sum()))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
    for run in runs:  # all have imported everything: now they go
        assert run.stdin is not None
        run.stdin.close()
    results = set()
    for run in runs:
        assert run.stdout is not None
        with run.stdout as out:
            results.add(out.read())
        assert run.wait() == 0
    mine = load_corpus(DataConfig(source=str(text), tokenizer="bpe"), cache=tmp_path / "cache")
    assert results == {f"{mine.sha256} {int(mine.train.astype('int64').sum())}\n"}
    assert len(os.listdir(tmp_path / "cache" / "tokens")) == 1


@pytest.mark.parametrize("error", [UserError("stop"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(type(error)):
        built_once(tmp_path, "key", build)
    assert os.listdir(tmp_path / "tokens") == []


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files hashed from now on, each file being large enough to be remembered."""
    hashed: list[Path] = []
    real = corpus.digest
    monkeypatch.setattr(cache, "REMEMBER_FROM", 1)
    monkeypatch.setattr(corpus, "digest", lambda document, count: hashed.append(document.path) or real(document, count))
    return hashed


def test_large_files_are_hashed_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = counted(monkeypatch)
    path = tmp_path / "a.txt"
    config = DataConfig(source=str(path))

    def load(content: bytes, age: float) -> str:
        path.write_bytes(content)
        os.utime(path, (time.time() - age,) * 2)
        return load_corpus(config, cache=tmp_path / "cache").sha256

    first = load(b"x" * 100, age=100)
    assert len(hashed) == 2  # the two splits
    assert load_corpus(config, cache=tmp_path / "cache").sha256 == first and len(hashed) == 2
    assert load(b"y" * 100, age=50) != first and len(hashed) == 4  # same length, other time
    assert load(b"y" * 101, age=50) != first and len(hashed) == 6
    other = DataConfig(source=str(path), validation_fraction=0.5)
    load_corpus(other, cache=tmp_path / "cache")
    assert len(hashed) == 8  # another split: other documents


def test_a_file_changed_just_now_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = counted(monkeypatch)
    path = tmp_path / "a.txt"
    seen = set()
    now = time.time_ns()  # both versions within one tick of a coarse clock
    for content in (b"x" * 100, b"y" * 100):
        path.write_bytes(content)
        os.utime(path, ns=(now, now))
        seen.add(load_corpus(DataConfig(source=str(path)), cache=tmp_path / "cache").sha256)
    assert len(seen) == 2 and len(hashed) == 4


def test_the_verdict_on_ids_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch)
    path = tmp_path / "a.bin"
    np.array([1, 2, 3, 900] * 5, "<u2").tofile(path)
    os.utime(path, (1, 1))
    said: list[str] = []
    for _ in range(2):
        load_corpus(DataConfig(source=str(path)), cache=tmp_path / "cache", progress=said.append)
    assert len([line for line in said if line.startswith("Checking")]) == 1
    with pytest.raises(UserError, match="position 3 holds 900"):  # another vocabulary asks the same memory
        load_corpus(DataConfig(source=str(path), bin_vocab_size=900), cache=tmp_path / "cache", progress=said.append)
    assert len([line for line in said if line.startswith("Checking")]) == 1


def test_damage_is_named(text: Path, tmp_path: Path) -> None:
    load_corpus(DataConfig(source=str(text)), cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    with (folder / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"train.bin in the cache is damaged; delete the folder"):
        load_corpus(DataConfig(source=str(text)), cache=tmp_path / "cache")
    (folder / "sha256.json").write_text("{")
    with pytest.raises(UserError, match=r"sha256.json must hold a JSON object, but is damaged.*delete the folder"):
        load_corpus(DataConfig(source=str(text)), cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cache folder .*file must be writable.*DEEPDELTA_CACHE"):
        load_corpus(DataConfig(source=str(text)), cache=tmp_path / "file")
    load_corpus(DataConfig(source=str(text / "0.txt")), cache=tmp_path / "file")  # needs no cache

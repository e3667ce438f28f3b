"""Data that changes or is damaged while it is used: one error, and no number of it."""

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from damage import flip
from deepdelta import load
from deepdelta.cli import main
from deepdelta.data import Corpus, DataConfig, load_corpus
from deepdelta.data import cache as cache_module
from deepdelta.errors import UserError
from deepdelta.models import GPT
from deepdelta.training import RunDirectory, evaluate
from deepdelta.training.trainer import Trainer
from tiny_runs import MODEL, assert_same_run, config, quietly, text_file

CHANGED = "must stay as it was when it was loaded, but was changed since"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "text"
    place.mkdir()
    for i in range(30):
        (place / f"{i}.txt").write_text(f"document {i} " * 30)
    return place


def later(path: Path, content: bytes) -> None:
    """Other content, at another time however coarse the clock is."""
    path.write_bytes(content)
    os.utime(path, (path.stat().st_mtime + 10,) * 2)


@pytest.mark.parametrize("content", [b"y" * 1000, b"x" * 999, b"x" * 1001, b""])
def test_a_mapped_file_that_changes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1000)
    corpus = load_corpus(DataConfig(source=str(path)))
    corpus.check_mapped()
    later(path, content)
    for check in (corpus.check_mapped, corpus.check_unchanged):
        with pytest.raises(UserError, match=rf"a.txt {CHANGED}"):
            check()
    path.unlink()
    with pytest.raises(UserError, match=r"a.txt cannot be read: No such file"):
        corpus.check_mapped()


def test_documents_and_their_tokens_in_the_cache(tmp_path: Path, folder: Path) -> None:
    corpus = load_corpus(DataConfig(source=str(folder)), cache=tmp_path / "cache")
    corpus.check_unchanged()
    later(folder / "7.txt", b"other")
    corpus.check_mapped()  # what is read is as it was
    with pytest.raises(UserError, match=rf"7.txt {CHANGED} \(\d+ bytes then, 5 now\)"):
        corpus.check_unchanged()
    (tokens,) = (tmp_path / "cache" / "tokens").glob("*/train.bin")
    os.truncate(tokens, 10)
    with pytest.raises(UserError, match=rf"train.bin {CHANGED}"):
        corpus.check_mapped()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_change_while_loading_leaves_nothing_in_the_cache(tmp_path: Path, folder: Path, tokenizer: str) -> None:
    def change(line: str) -> None:
        if line.startswith("Encoding the train"):
            later(folder / "7.txt", (folder / "7.txt").read_bytes().upper())

    with pytest.raises(UserError, match=rf"7.txt {CHANGED}"):
        load_corpus(DataConfig(source=str(folder), tokenizer=tokenizer), cache=tmp_path / "cache", progress=change)
    assert os.listdir(tmp_path / "cache" / "tokens") == []


@pytest.mark.parametrize("cut", [True, False], ids=["cut to nothing", "changed in place"])
def test_a_run_stops_at_a_change_and_continues_with_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    source = text_file(tmp_path / "a.txt")
    content = source.read_bytes()
    quietly(config(source), tmp_path / "whole")
    real = Trainer._one_step

    def step(self: Trainer) -> None:
        real(self)
        if self.step == 10:
            later(source, b"" if cut else content.upper())

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", step)
        with pytest.raises(UserError, match=CHANGED):
            quietly(config(source), tmp_path / "run")
    assert RunDirectory(tmp_path / "run").step() == 7  # the last checkpoint before the change
    source.write_bytes(content)
    quietly(config(source), tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_no_number_is_given_of_a_changed_text(tmp_path: Path) -> None:
    source = text_file(tmp_path / "a.txt")
    settings = config(source, model={**MODEL, "vocab_size": 256})
    corpus: Corpus = load_corpus(settings.data)
    later(source, b"")
    with pytest.raises(UserError, match=CHANGED):
        evaluate(GPT(settings.model), corpus, batch_size=2, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_flipped_bit_in_the_cache(tmp_path: Path, folder: Path, name: str, tokenizer: str) -> None:
    settings = DataConfig(source=str(folder), tokenizer=tokenizer, bpe_vocab_size=300)
    before = load_corpus(settings, cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    flip(entry / name, at=20)
    message = rf"{name} in the cache is damaged; delete the folder {re.escape(str(entry))} and start again"
    with pytest.raises(UserError, match=message):
        load_corpus(settings, cache=tmp_path / "cache")
    flip(entry / name, at=20)
    assert np.array_equal(load_corpus(settings, cache=tmp_path / "cache").train, before.train)
    (entry / name).unlink()
    with pytest.raises(UserError, match=message):
        load_corpus(settings, cache=tmp_path / "cache")


def test_a_flipped_bit_in_a_remembered_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "REMEMBER_FROM", 1)
    path = tmp_path / "a.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    os.utime(path, (1, 1))
    load_corpus(DataConfig(source=str(path)), cache=tmp_path / "cache")
    facts = list((tmp_path / "cache" / "facts").iterdir())
    assert len(facts) == 2  # the hashes, and the largest ids
    for fact in facts:
        text = fact.read_text()
        fact.write_text(re.sub(r"[0-9]", lambda digit: str(int(digit[0]) ^ 1), text, count=1))
        assert fact.read_text() != text
        with pytest.raises(UserError, match=rf"{fact.name} in the cache is damaged; delete it"):
            load_corpus(DataConfig(source=str(path)), cache=tmp_path / "cache")
        fact.write_text(text)


def test_a_damaged_tokenizer_of_a_run(tmp_path: Path) -> None:
    source = text_file(tmp_path / "a.txt")
    data = {"source": str(source), "tokenizer": "bpe", "bpe_vocab_size": 300}
    quietly(config(source, steps=1, data=data), tmp_path / "run")
    file = tmp_path / "run" / "tokenizer.json"
    good = file.read_text(encoding="utf-8")
    assert load(tmp_path / "run").tokenizer is not None
    file.write_text(good.replace('"Ā":', '"?!":', 1), encoding="utf-8")  # another word: still a tokenizer
    with pytest.raises(UserError, match=r"tokenizer.json is damaged, another or gone"):
        load(tmp_path / "run")
    file.write_text('{"deepdelta_tokenizer": "bytes"}')
    with pytest.raises(UserError, match=r"tokenizer.json is damaged, another or gone"):
        load(tmp_path / "run")
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is damaged, another or gone"):
        load(tmp_path / "run")
    file.write_text(good, encoding="utf-8")
    load(tmp_path / "run")


def test_without_a_home(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "DEEPDELTA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    source = text_file(tmp_path / "a.txt")
    assert quietly(config(source, steps=1), tmp_path / "run").finished  # one file of bytes needs no cache
    with pytest.raises(UserError, match="no home folder to hold it: set the environment variable DEEPDELTA_CACHE"):
        load_corpus(DataConfig(source=str(folder)))
    monkeypatch.setenv("DEEPDELTA_CACHE", str(tmp_path / "mine"))
    assert load_corpus(DataConfig(source=str(folder))).train_bytes


@pytest.mark.parametrize("field", ["source", "pattern", "tokenizer"])
def test_settings_that_are_not_utf8(field: str) -> None:
    with pytest.raises(UserError, match=rf"{field} must be UTF-8, got 'a\\udcff'; give another"):
        DataConfig(**{field: "a\udcff"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "r\udcff"),
        ("train", "--config=r\udcff"),
        ("train", "r", "--data.source", "\udcff.txt"),
        ("train", "r", "--config", "\udcff.toml"),
        ("evaluate", "\udcff"),
        ("audit", "r", "--out", "\udcff"),
        ("study", "small-embeddings", "--out", "\udcff"),
        ("bench", "--out", "\udcff"),
        ("import", "\udcff", "--run", "r"),
    ],
)
def test_arguments_that_are_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and os.listdir(tmp_path) == []
    assert "must be UTF-8" in capsys.readouterr().err


def test_an_argument_that_the_locale_cannot_read(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "deepdelta", "evaluate", "résumé"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "every argument must be in the locale's encoding, ascii, got" in done.stderr
    assert "set PYTHONUTF8=1 for UTF-8." in done.stderr


def test_a_run_folder_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the name of a run directory must be UTF-8"):
        quietly(config(text_file(tmp_path / "a.txt")), Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))
    assert os.listdir(tmp_path) == ["a.txt"]

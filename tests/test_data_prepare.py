"""`prepare` writes what the texts are, stopped or not; another program could read it."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from deepdelta.cli import main
from deepdelta.cli.options import parse
from deepdelta.data import DataConfig, load_corpus
from deepdelta.data import prepare as module
from deepdelta.data.prepare import prepare
from deepdelta.data.tokenizer import BPETokenizer, read_tokenizer
from deepdelta.errors import UserError

TEXTS = [f"document {i}: größe and {'more ' * (i % 9)}of it\n" for i in range(80)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[:60]))
    for i, text in enumerate(TEXTS[60:]):
        (folder / f"b{i:02d}.txt").write_text(text)
    tokenizer = BPETokenizer.train(iter(TEXTS), vocab_size=320)
    tokenizer.save(tmp_path)
    return folder


def options(source: Path, **changes) -> dict:
    given = {"tokenizer": source.parent / "tokenizer.json", "field": "body", "shard_tokens": 150}
    return given | {"validation_fraction": 0.2} | changes


def ids_of(path: Path) -> np.ndarray:
    """As llm.c reads them."""
    numbers = np.fromfile(path, np.int32, 256)
    assert numbers[:2].tolist() == [20240520, 1]
    ids = np.fromfile(path, np.uint16, offset=1024)
    assert len(ids) == numbers[2]
    return ids


def test_shards_hold_the_documents_and_training_reads_them(source, tmp_path):
    out, said = tmp_path / "out", []
    sums = prepare(source, out, progress=said.append, **options(source))
    tokenizer = read_tokenizer(out / "tokenizer.json")
    texts: dict[str, list[str]] = {}
    for split in ("train", "val"):
        shards = [ids_of(path) for path in sorted(out.glob(f"{split}_*.bin"))]
        assert sum(map(len, shards)) == sums[split] and all(shard[0] == tokenizer.separator for shard in shards)
        if split == "train":
            assert len(shards) > 3 and all(150 <= len(shard) < 190 for shard in shards[:-1])
        texts[split] = tokenizer.decode(np.concatenate(shards).tolist()).split("<|endoftext|>")[1:]
    assert sorted(texts["train"] + texts["val"]) == sorted(TEXTS)
    assert 6 <= len(texts["val"]) <= 30 and len(said) > 3 and said[0].endswith(" tokens.")
    data = DataConfig(source=str(out), tokenizer=str(out / "tokenizer.json"))
    corpus = load_corpus(data, cache=tmp_path / "cache")
    assert (len(corpus.train), len(corpus.validation)) == (sums["train"], sums["val"])
    assert corpus.tokenizer is not None and corpus.tokenizer.sha256 == tokenizer.sha256
    bare = tmp_path / "bare"
    assert prepare(source, bare, **options(source, header=False)) == sums
    for path in bare.glob("*.bin"):
        assert np.array_equal(np.fromfile(path, np.uint16), ids_of(out / path.name))


@pytest.mark.parametrize("writes", [1, 3, 4, 6])
def test_stopped_it_goes_on_to_the_same_shards(source, tmp_path, monkeypatch, writes):
    prepare(source, tmp_path / "whole", **options(source))
    left = writes

    def stop(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    whole = module._Split.flush
    monkeypatch.setattr(module, "_AT_ONCE", 200)
    with monkeypatch.context() as patch:
        patch.setattr(module._Split, "flush", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out", **options(source))
    read = []
    monkeypatch.setattr(module, "_encode", lambda waiting, encoder: read.extend(waiting) or original(waiting, encoder))
    prepare(source, tmp_path / "out", **options(source))
    assert len(read) == 80 or writes > 1
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert files[0] == files[1]
    read.clear()
    prepare(source, tmp_path / "out", **options(source))
    assert not read  # finished: nothing is read again


original = module._encode


def test_what_is_refused(source, tmp_path):
    out = tmp_path / "out"
    prepare(source, out, **options(source))
    with pytest.raises(UserError, match="was begun with other shard_tokens; give those again, or choose another"):
        prepare(source, out, **options(source, shard_tokens=500))
    (source / "more.txt").write_text("more")
    with pytest.raises(UserError, match="was begun with other files"):
        prepare(source, out, **options(source))
    (source / "more.txt").unlink()
    shard = out / "train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_000001.bin is damaged or gone; delete the folder and prepare anew"):
        prepare(source, out, **options(source))
    (out / "prepared.json").unlink()
    with pytest.raises(UserError, match=r"must be a folder for prepared text alone, and holds train_000000.bin"):
        prepare(source, out, **options(source))
    with pytest.raises(UserError, match=r"a.jsonl, line 1: there is no 'text', but the fields 'body'"):
        prepare(source, tmp_path / "other", **options(source, field="text"))
    assert not (tmp_path / "other").exists()  # nothing is locked to the mistake
    prepare(source, tmp_path / "other", **options(source))
    (source / "c.txt").write_bytes(b"\xff\xfa not UTF-8")
    with pytest.raises(UserError, match=r"c.txt must be UTF-8; byte 0 of document 0 in it is not"):
        prepare(source, tmp_path / "third", **options(source))
    with pytest.raises(UserError, match=r"no document of .* fell to val; choose another fraction"):
        prepare(source / "b00.txt", tmp_path / "fourth", **options(source, validation_fraction=1e-9))
    assert not (tmp_path / "fourth").exists()
    with pytest.raises(UserError, match="shard_tokens must be at least 1, got 0"):
        prepare(source, tmp_path / "fifth", **options(source, shard_tokens=0))


def test_between_shards_it_says_how_far_it_is(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.0)
    said: list[str] = []
    sums = prepare(source, tmp_path / "out", progress=said.append, **options(source, shard_tokens=10**9))
    assert len(said) == 80 and said[-1] == f"80 documents, {sum(sums.values()):,} tokens."


@pytest.mark.usefixtures("unchecked")
def test_the_command(source, tmp_path, capsys):
    words = [
        "prepare",
        source,
        "--out",
        tmp_path / "out",
        "--tokenizer",
        tmp_path / "tokenizer.json",
        "--field",
        "body",
    ]
    main([*map(str, words), "--validation-fraction", "0.2"])
    printed = capsys.readouterr()
    assert "training and " in printed.out and "Next: deepdelta train runs/new --data.source" in printed.out
    assert (tmp_path / "out" / "prepared.json").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("size", "more"), [(65_536, ""), (65_537, " --data.bin-dtype uint32")])
def test_the_next_command_reads_bare_shards_of_many_ids(tmp_path, capsys, size, more):
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, size)}
    made = Tokenizer(WordLevel(words, unk_token="<|endoftext|>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.save(str(tmp_path / "many.json"))
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"w{size - 1} w{i + 1} " * 9)
    out, tokenizer = tmp_path / "out", tmp_path / "many.json"
    words = ["prepare", tmp_path, "--pattern", "*.txt", "--out", out, "--tokenizer", tokenizer, "--no-header"]
    main([*map(str, words), "--validation-fraction", "0.3"])
    following = capsys.readouterr().out.splitlines()[-1]
    assert following.endswith(f"tokenizer.json{more}")
    corpus = load_corpus(parse(shlex.split(following)[2:]).settings.data)
    assert corpus.train[1] == size - 1 and corpus.train.dtype == ("u4" if more else "u2")

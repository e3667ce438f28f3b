"""Mixtures of sources, what a run keeps of its shards, and batches made ahead."""

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Philox

from deepdelta import GPT, GPTConfig, TrainConfig, UserError
from deepdelta.data import DataConfig, batch, check_context, load_corpus
from deepdelta.data.prepare import prepare
from deepdelta.data.tokenizer import BPETokenizer
from deepdelta.device import choose_device
from deepdelta.training import trainer
from deepdelta.training.optimizer import build_optimizer
from deepdelta.training.prefetch import Prefetched
from deepdelta.training.step import micro_losses, training_step
from tiny_runs import assert_same_run, config, quietly, text_file

TEXTS = [f"document {i}: größe and {'more ' * (i % 9)}of it\n" for i in range(120)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two prepared folders of several shards, of different texts and one tokenizer."""
    place = tmp_path_factory.mktemp("mixed")
    BPETokenizer.train(iter(TEXTS), vocab_size=300).save(place)
    for name, texts in (("web", TEXTS[:60]), ("code", TEXTS[60:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        given: dict[str, Any] = {"tokenizer": place / "tokenizer.json", "shard_tokens": 300, "validation_fraction": 0.2}
        prepare(place / f"{name}.jsonl", place / name, **given)
    return {name: place / name for name in ("web", "code")}


def mixed(folders: dict[str, Path], web: float = 3.0, code: float = 1.0) -> DataConfig:
    weights = (str(folders["web"]), web), (str(folders["code"]), code)
    return DataConfig(
        source=str(folders["web"]), tokenizer=str(folders["web"].parent / "tokenizer.json"), mixture=weights
    )


def test_windows_are_drawn_by_the_weights_and_by_nothing_but_seed_and_step() -> None:
    sources = [np.arange(1000 * n, 1000 * n + 200 * (n + 1), dtype=np.uint16) for n in range(3)]
    mixture = list(zip(sources, (0.6, 0.3, 0.1), strict=True))
    drawn: dict[str, Any] = {"seed": 5, "batch_size": 2000, "context": 7, "mixture": mixture}
    inputs, labels = batch(sources[0], step=3, **drawn)
    assert labels[:, :-1].equal(inputs[:, 1:]) and (labels - inputs == 1).all()  # never over an end of a source
    counts = Counter((inputs[:, 0] // 1000).tolist())
    for number, share in enumerate((0.6, 0.3, 0.1)):
        assert abs(counts[number] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    # The formula in whole numbers.
    key = Philox(key=np.array([5, 3], np.uint64))
    for row in inputs[:50]:
        which, where = (int(key.random_raw()) for _ in range(2))
        at = (10 * which >= 6 << 64) + (10 * which >= 9 << 64)
        assert row[0] == sources[at][where % (len(sources[at]) - 7)]
    assert batch(sources[1], step=3, **drawn)[0].equal(inputs) and not batch(sources[0], step=4, **drawn)[0].equal(
        inputs
    )
    assert batch(sources[0], step=3, **drawn | {"batch_size": 5})[0].equal(inputs[:5])


def test_a_mixture_maps_its_sources_and_is_another_corpus_with_other_weights(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    corpus = load_corpus(mixed(folders), cache=tmp_path)
    alone = {name: load_corpus(DataConfig(source=str(folder)), cache=tmp_path) for name, folder in folders.items()}
    for (tokens, share), name, expected in zip(corpus.mixture, ("web", "code"), (0.75, 0.25), strict=True):
        assert isinstance(tokens, np.memmap) and np.array_equal(tokens, alone[name].train)
        assert share == expected
    assert np.array_equal(corpus.validation, alone["web"].validation)
    assert corpus.sha256 == load_corpus(mixed(folders, 6.0, 2.0), cache=tmp_path).sha256
    hashes = {load_corpus(mixed(folders, 1.0, 1.0), cache=tmp_path).sha256, corpus.sha256, alone["web"].sha256}
    assert len(hashes) == 3
    assert len(corpus.shards) == sum(len(one.shards) for one in alone.values()) > 6
    assert "a mixture: 75.0% of " in corpus.description
    small, large = sorted(folders, key=lambda name: len(alone[name].train))
    given = replace(corpus, train=alone[large].train, validation=alone[large].train)
    with pytest.raises(UserError, match=r"context must be smaller .* and the mixed split has"):
        check_context(given, len(alone[small].train))
    other = folders["code"].parent / "text.txt"
    text_file(other)
    with pytest.raises(UserError, match=r"must have one tokenizer and vocabulary, and .*text\.txt has another than"):
        load_corpus(DataConfig(source=str(folders["web"]), mixture=((str(other), 1.0),)), cache=tmp_path)
    for weight in (0.0, -1.0):
        with pytest.raises(UserError, match="mixture"):
            DataConfig(mixture=(("a", weight),))
    with pytest.raises(UserError, match="the sources of a mixture must be different ones"):
        DataConfig(mixture=(("a", 1.0), ("a", 2.0)))


def test_a_run_keeps_the_hash_of_every_shard_and_names_the_one_that_changed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPDELTA_CACHE", str(tmp_path / "cache"))
    web, code = (tmp_path / name for name in ("web", "code"))
    for name, place in (("web", web), ("code", code)):
        place.mkdir()
        for file in folders[name].iterdir():
            (place / file.name).write_bytes(file.read_bytes())
    data = {
        "source": str(web),
        "tokenizer": str(web / "tokenizer.json"),
        "mixture": [[str(web), 0.7], [str(code), 0.3]],
    }
    settings = config(tmp_path, data=data, steps=4)
    quietly(settings, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "environment.json").read_text())["shards"]
    assert {"train_000001.bin", f"{code}/train_000001.bin", "val_000000.bin"} <= kept.keys()
    shard = code / "train_000001.bin"
    whole = bytearray(shard.read_bytes())
    changed = bytes(whole[:-2]) + bytes([whole[-2] ^ 1, whole[-1]])
    shard.write_bytes(changed)
    with pytest.raises(
        UserError, match=r"train_000001.bin must have the hash \w+\.\.\. that prepared.json holds, and has"
    ):
        quietly(settings, tmp_path / "other")
    (code / "prepared.json").unlink()  # then the run itself says it
    with pytest.raises(
        UserError, match=rf"was trained on another corpus \(shards\.{code}/train_000001\.bin: '\w+' there"
    ):
        quietly(config(tmp_path, data=data, steps=5), tmp_path / "run")
    assert not (tmp_path / "other").exists()
    shard.unlink()
    with pytest.raises(UserError, match=rf"another corpus \(shards\.{code}/train_000001\.bin: '\w+' there, None here"):
        quietly(config(tmp_path, data=data, steps=5), tmp_path / "run")
    told = json.loads((web / "prepared.json").read_text())
    (web / "train_000001.bin").unlink()
    with pytest.raises(UserError, match=r"web/train_000001.bin is gone: restore it"):
        quietly(settings, tmp_path / "other")
    (web / "prepared.json").write_text(json.dumps(told | {"finished": False}))
    with pytest.raises(UserError, match="web must be prepared to its end: run the same `deepdelta prepare` again"):
        quietly(settings, tmp_path / "other")


def test_batches_made_ahead_are_those_of_their_steps() -> None:
    made: list[tuple[int, str]] = []

    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        made.append((step, threading.current_thread().name))
        if step == 4:
            raise UserError("the text changed")
        return torch.tensor([step]), torch.tensor([-step])

    batches = Prefetched(make, pinned=False)
    assert [batches(step)[0].item() for step in (0, 1, 2, 7, 8, 3)] == [0, 1, 2, 7, 8, 3]
    with pytest.raises(UserError, match="the text changed"):
        batches(4)  # not before it is asked for
    batches.thread.shutdown()
    assert [step for step, thread in made if thread.startswith("batches")] == [1, 2, 3, 8, 9, 4]


def test_a_run_with_batches_made_ahead_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(text_file(tmp_path / "text.txt"))
    quietly(settings, tmp_path / "plain")
    original = trainer.Trainer.__init__

    def init(self: trainer.Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        self.batches = Prefetched(self._batch, pinned=False)

    monkeypatch.setattr(trainer.Trainer, "__init__", init)
    quietly(settings, tmp_path / "ahead")
    assert_same_run(tmp_path / "plain", tmp_path / "ahead")


@pytest.mark.parametrize("kind", ["one", "mixed"])
def test_batches_take_a_twentieth_of_a_small_model_s_step_at_most(kind: str) -> None:
    """In seconds of this process alone, whatever else the machine does; of larger models a smaller share yet."""
    sources = [np.random.default_rng(n).integers(0, 512, 10**6).astype(np.uint16) for n in range(2)]
    mixture = list(zip(sources, (0.7, 0.3), strict=True)) if kind == "mixed" else []
    model = GPT(GPTConfig(vocab_size=512, context=128, layers=2, heads=2, dim=64), seed=0)
    optimizer = build_optimizer(model, TrainConfig(lr=1e-3))
    spent = {"batches": 0.0, "steps": 0.0}
    for step in range(8):
        began = time.process_time()
        drawn: dict[str, Any] = {"seed": 0, "batch_size": 8, "context": 128, "mixture": mixture}
        pair = batch(sources[0], step=step, **drawn)
        made = time.process_time()
        training_step(model, optimizer, micro_losses(model, *pair, 1, choose_device("cpu", "fp32")), clip=1.0)
        if step >= 2:  # the first ones warm up
            spent["batches"] += made - began
            spent["steps"] += time.process_time() - made
    assert 20 * spent["batches"] < spent["steps"], spent

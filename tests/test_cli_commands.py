"""The commands as typed: train, generate and evaluate on every kind of corpus, settings by file, preset and option."""

import importlib.metadata
import json
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import deepdelta.cli.runs
from deepdelta import PRESETS, generate, load
from deepdelta.cli import COMMANDS, main
from deepdelta.config import to_plain
from deepdelta.data import load_corpus, spread
from deepdelta.files import write_json
from deepdelta.training import RunDirectory, TrainConfig
from tiny_runs import ENVIRONMENT, command, config, nats, quietly, rows, settings, text_file, typed

# As users run it: tyro's mark for a missing option is no Path, which the run-time type checks would refuse.
pytestmark = pytest.mark.usefixtures("unchecked")

PLAIN_START = ("--model.embedding-std", "0.02", "--lr", "2e-3")
TINY = ("--model.context", "16", "--model.dim", "16", "--model.layers", "1", "--model.heads", "2", *PLAIN_START)
SHORT = (*TINY, "--steps", "6", "--batch-size", "2", "--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    quietly(config(source, steps=30, lr=0.01), path)
    return path


def out(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    main([*map(str, arguments)])
    return capsys.readouterr().out


def evaluated(printed: str) -> dict[str, float]:
    """The numbers that `deepdelta evaluate` prints."""
    found = re.findall(r"^(loss|perplexity|bits per byte) +([0-9.]+)", printed, re.MULTILINE)
    tokens = re.search(r"^on ([0-9,]+) tokens, the whole validation split; contexts: consecutive", printed, re.M)
    assert tokens is not None, printed
    return {name: float(number) for name, number in found} | {"tokens": int(tokens[1].replace(",", ""))}


def test_help() -> None:
    shown = subprocess.run(command("--help"), env=ENVIRONMENT, capture_output=True, text=True)
    assert shown.returncode == 0 and not shown.stderr
    assert all(name in shown.stdout for name in COMMANDS)


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert out(capsys, "--version") == f"deepdelta {importlib.metadata.version('deep-delta-learning')}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_each_command(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: deepdelta {name}" in capsys.readouterr().out


def test_train_evaluate_generate_on_bytes(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    trained = out(capsys, "train", tmp_path / "run", *SHORT, "--data.source", source)
    assert "Device cpu (asked for), precision fp32, CPU threads: 1." in trained
    assert f"the text file {source}: 1 document" in trained and "split by position (the last 10.0%)" in trained
    final = rows(tmp_path / "run")[-1]
    assert f"validation loss {final['validation_loss']:.4f} nats per token." in trained
    numbers = evaluated(out(capsys, "evaluate", tmp_path / "run"))
    corpus = load_corpus(RunDirectory(tmp_path / "run").config().data)
    losses = nats(load(tmp_path / "run").model, corpus.validation)
    loss = math.fsum(losses) / len(losses)
    assert numbers["tokens"] == len(losses) == final["validation_tokens"]
    assert numbers["loss"] == pytest.approx(loss, abs=6e-5) == pytest.approx(final["validation_loss"], abs=6e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert numbers["bits per byte"] == pytest.approx(math.fsum(losses) / math.log(2) / len(corpus.validation), rel=1e-4)


def test_generate_prints_the_prompt_first_and_then_each_piece(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(run).model
    expected = list(generate(model, list("dé".encode()), tokens=12, temperature=0.7, top_k=9, top_p=0.9, seed=4))
    shown: list[str] = []

    def watched(*arguments: Any, **options: Any) -> Iterator[int]:
        for one in generate(*arguments, **options):
            shown.append(capsys.readouterr().out)
            yield one

    monkeypatch.setattr(deepdelta.cli.runs, "generate", watched)
    drawing = ("--temperature", "0.7", "--top-k", "9", "--top-p", "0.9", "--seed", "4")
    options = ("--prompt", "dé", "--tokens", "12", *drawing)
    last = out(capsys, "generate", run, *options)
    assert shown[0] == "dé" and sum(map(bool, shown)) > 6
    assert "".join(shown) + last == "dé" + bytes(expected).decode(errors="replace") + "\n"


def test_the_checkpoint_named_is_the_one_that_is_used(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    run, name = tmp_path / "run", "average.safetensors"
    quietly(config(source, steps=12, lr=0.5, average="last", average_steps=8, backend="reference"), run)
    last, averaged = load(run).model, load(run, name).model
    named = ("--checkpoint", name)
    options = ("--prompt", "def", "--tokens", "24", "--temperature", "3")
    drawn = bytes(generate(averaged, list(b"def"), tokens=24, temperature=3.0)).decode(errors="replace")
    assert out(capsys, "generate", run, *options, *named) == f"def{drawn}\n" != out(capsys, "generate", run, *options)
    main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "out"), *named])
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.equal(exported[key]) for key, tensor in averaged.state_dict().items())
    assert not exported["embedding.weight"].equal(last.embedding.weight)
    losses = {}
    for words in ((), named):
        folder = tmp_path / f"audit{len(words)}"
        main(["audit", str(run), "--tokens", "48", "--sample", "5", "--device", "cpu", "--out", str(folder), *words])
        losses[words] = json.loads((folder / "audit.json").read_text())["findings"]["loss"]
    windows = spread(load_corpus(RunDirectory(run).config().data).validation, context=16, limit=48)
    expected = averaged(windows[:, :-1], windows[:, 1:]).loss.item()
    assert losses[named] == pytest.approx(expected, abs=1e-5) != pytest.approx(losses[()], abs=1e-5)


def test_bpe(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    bpe = ("--data.tokenizer", "bpe", "--data.bpe-vocab-size", "320")
    trained = out(capsys, "train", run, *SHORT, "--data.source", source, *bpe)
    assert "Training a BPE of 320 ids" in trained and "validation tokens of 320 ids" in trained
    assert RunDirectory(run).config().model.vocab_size == 320
    model, tokenizer = load(run)
    assert tokenizer is not None and tokenizer.vocab_size == 320
    corpus = load_corpus(RunDirectory(run).config().data)
    assert corpus.validation_bytes is not None and len(corpus.validation) < corpus.validation_bytes
    assert tokenizer.decode(corpus.validation.tolist()) == source.read_bytes()[-corpus.validation_bytes :].decode()
    numbers = evaluated(out(capsys, "evaluate", run, "--batch-size", "3"))
    total = math.fsum(nats(model, corpus.validation))
    assert numbers["loss"] == pytest.approx(total / (len(corpus.validation) - 1), abs=6e-5)
    assert numbers["bits per byte"] == pytest.approx(total / math.log(2) / corpus.validation_bytes, rel=1e-4)
    text = out(capsys, "generate", run, "--prompt", "def return", "--tokens", "9", "--temperature", "0")
    ids = list(generate(model, tokenizer.encode("def return"), tokens=9, temperature=0.0))
    assert text == "def return" + tokenizer.decode(ids) + "\n"


def test_token_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ids, run = tmp_path / "ids.bin", tmp_path / "run"
    np.random.default_rng(0).integers(0, 60, 3000).astype("<u2").tofile(ids)
    out(capsys, "train", run, *SHORT, "--data.source", ids, "--data.bin-vocab-size", "60")
    assert not (run / "tokenizer.json").exists() and load(run).tokenizer is None
    printed = out(capsys, "evaluate", run)
    assert "bits per byte" not in printed and evaluated(printed)["tokens"] == 299
    assert evaluated(printed)["loss"] == pytest.approx(math.log(60), abs=0.2)
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(run), "--prompt", "a"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert "was trained on bare token ids, so there is no text; train with --data.tokenizer FILE.json" in said.err


def test_folder(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    text = source.read_text(encoding="utf-8")
    for number in range(12):
        (folder / f"part{number % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"part{number % 3}" / f"{number}.txt").write_text(text[number * 250 : (number + 1) * 250])
    (folder / "left.out").write_bytes(b"\xff" * 500)
    options = ("--data.source", folder, "--data.pattern", "**/*.txt", "--data.validation-fraction", "0.2")
    trained = out(capsys, "train", tmp_path / "run", *SHORT, *options)
    assert "12 documents" in trained and "split by document" in trained
    assert math.isfinite(evaluated(out(capsys, "evaluate", tmp_path / "run"))["loss"])
    (folder / "part0" / "0.txt").write_text("changed")
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run")])


def test_the_defaults_are_those_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed(monkeypatch) == TrainConfig()


@pytest.mark.parametrize("form", ["toml", "json"])
def test_options_beat_the_preset_and_the_preset_beats_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    file = tmp_path / f"settings.{form}"
    residual = {"rule": "write_only", "value_channels": 2, "gate_init": 0.5}
    if form == "json":
        write_json(file, {"steps": 7, "lr": 0.25, "betas": [0.5, 0.6], "model": {"dim": 64, "residual": residual}})
    else:
        file.write_text(
            'steps = 7\nlr = 0.25\nbetas = [0.5, 0.6]\n[model]\ndim = 64\n[model.residual]\nrule = "write_only"\n'
            "value_channels = 2\ngate_init = 0.5\n"
        )
    read = typed(monkeypatch, "--config", file)
    assert (read.steps, read.lr, read.betas, read.model.dim) == (7, 0.25, (0.5, 0.6), 64)
    chosen = read.model.residual
    assert (chosen.rule, chosen.value_channels, chosen.gate_init) == ("write_only", 2, 0.5)
    assert (read.batch_size, chosen.expansion) == (TrainConfig().batch_size, "repeat")
    both = typed(monkeypatch, f"--config={file}", "--steps", "9", "--model.residual.gate-init", "1.5")
    assert (both.steps, both.lr, both.model.residual.gate_init) == (9, 0.25, 1.5)
    assert both.model.residual.rule == "write_only"
    preset = typed(monkeypatch, "--config", file, "--preset", "additive", "--model.residual.norm-eps", "0.5")
    assert preset.steps == 7 and preset.model.residual.norm_eps == 0.5
    assert to_plain(preset.model.residual) == to_plain(PRESETS["additive"]) | {"norm_eps": 0.5}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_trains(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, name: str) -> None:
    out(capsys, "train", tmp_path, "--preset", name, *SHORT, "--steps", "2", "--data.source", source)
    assert to_plain(RunDirectory(tmp_path).config().model.residual) == to_plain(PRESETS[name])
    assert load(tmp_path).model.config.residual == PRESETS[name]


def test_the_same_command_continues_and_more_steps_extend(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    write_json(tmp_path / "a.json", settings(source, steps=4))
    typed = ("train", tmp_path / "run", "--config", tmp_path / "a.json")
    out(capsys, *typed)
    assert "has all its 4 steps; give more --steps to extend it." in out(capsys, *typed)
    assert "at step 4 of 6" in out(capsys, *typed, "--steps", "6")
    again = json.loads((tmp_path / "run" / "config.json").read_text())
    assert again["steps"] == 6
    out(capsys, "train", tmp_path / "new", "--config", tmp_path / "a.json", "--init-from", tmp_path / "run")
    assert rows(tmp_path / "new")[0]["loss"] < rows(tmp_path / "run")[0]["loss"]


def test_the_device_is_chosen_and_said(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    printed = out(capsys, "train", tmp_path, *TINY, "--steps", "1", "--data.source", source, "--precision", "bf16")
    assert "Device cpu (no GPU is present), precision bf16, CPU threads: 1." in printed
    assert json.loads((tmp_path / "environment.json").read_text())["precision"] == "bf16"

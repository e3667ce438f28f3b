"""What is larger than the machine is refused before it is made; a small checkpoint makes no large model."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepdelta import GPT, PRESETS, GPTConfig, UserError, limits, load
from deepdelta.cli import main
from deepdelta.data import DataConfig, load_corpus
from deepdelta.files import write_json
from deepdelta.interop import load_published
from deepdelta.interop.checkpoint import read_published
from deepdelta.lab.measure.cost import measure_costs
from deepdelta.models import least_bytes, parameter_count
from deepdelta.training import evaluate
from test_oracle import vector
from tiny_runs import ENVIRONMENT, config, quietly, settings, text_file

MIB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    quietly(config(source, steps=1), run)
    return run


def having(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(limits, "available_bytes", lambda device=None: available)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sharing", ["block", "sublayer"])
def test_parameters_are_counted_as_they_are_made(preset: str, sharing: str) -> None:
    residual = dataclasses.replace(PRESETS[preset], compression_sharing=sharing)
    for layers in (1, 2, 5):
        model = GPTConfig(vocab_size=11, layers=layers, heads=2, dim=8, context=6, residual=residual)
        made = GPT(model)
        numbers = sum(parameter.numel() for parameter in made.parameters())
        assert parameter_count(model) == numbers
        held = [*made.parameters(), *made.rotary.tables(torch.device("cpu"))]
        assert least_bytes(model) == sum(tensor.nbytes for tensor in held) == 4 * (numbers + 6 * 4)


def test_counting_a_model_of_many_layers_makes_none_of_them() -> None:
    few, many = (GPTConfig(vocab_size=11, layers=layers, heads=2, dim=8) for layers in (2, 1 << 24))
    one = parameter_count(dataclasses.replace(few, layers=3)) - parameter_count(few)
    assert parameter_count(many) == parameter_count(few) + ((1 << 24) - 2) * one


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux's account of memory")
def test_the_available_memory_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = subprocess.run(["free", "-b"], capture_output=True, text=True, env=ENVIRONMENT | {"LC_ALL": "C"}).stdout
    monkeypatch.setattr(limits, "CONTAINERS", ())
    if told:
        rows = {line.split()[0]: line.split()[1:] for line in told.splitlines()[1:]}
        expected = int(rows["Mem:"][-1]) + int(rows["Swap:"][-1])
        assert limits.available_bytes() == pytest.approx(expected, rel=0.3)
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "unlimited").write_text("max\n")
    monkeypatch.setattr(limits, "CONTAINERS", (str(tmp_path / "unlimited"), str(tmp_path / "memory.max"), "/absent"))
    assert limits.available_bytes() == MIB


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": {"vocab_size": 1 << 24, "dim": 1 << 20}}, "the model must fit into memory"),
        ({"model": {"layers": 1 << 24}}, "the model must fit into memory"),
        ({"model": {"mlp_dim": 1 << 24, "dim": 1 << 14}}, "the model must fit into memory"),
        ({"batch_size": 10**18}, "a batch .* must fit into memory"),
        ({"accumulate": 10**15}, "a batch .* must fit into memory"),
        ({"batch_size": 10**9}, "must fit into memory"),
    ],
)
def test_a_run_past_memory_is_refused_and_leaves_nothing(
    source: Path, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(UserError, match=what + r".*at least [\d,.]+ GiB are needed, [\d,.]+ GiB are available"):
        quietly(config(source, **changes), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_bound_of_a_run_is_below_what_its_steps_take(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that fits is refused: the bytes of a step, all allocations registered, are above the bound."""
    small = config(source, model={"vocab_size": 5000, "context": 64}, batch_size=8)
    cost = measure_costs({"one": small}, baseline="one", vocab_size=5000, rounds=1)["one"]
    having(monkeypatch, cost.peak_bytes)
    quietly(dataclasses.replace(small, steps=1), tmp_path / "run")
    having(monkeypatch, MIB)
    with pytest.raises(UserError, match=r"a training step .* must fit into memory: at least 0.02 GiB"):
        quietly(dataclasses.replace(small, steps=2), tmp_path / "run")
    with pytest.raises(UserError, match=r"a training step .* must fit into memory"):
        measure_costs({"one": small}, baseline="one", vocab_size=5000, rounds=1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"threads": 10**18}, r"threads must be at most 1,024, got 1,000,000,000,000,000,000"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"steps": 1 << 63}, "steps must be at most 4,611,686,018,427,387,904, got 9,223,"),
        ({"model": {"vocab_size": 1 << 60}}, "vocab_size must be at most 16,777,216, got 1,152,"),
        ({"model": {"dim": 1 << 40}}, "dim must be at most 16,777,216, got"),
        ({"model": {"layers": 1 << 40}}, "layers must be at most 16,777,216, got"),
        ({"model": {"heads": 1 << 20, "head_dim": 1 << 20}}, "heads times head_dim must be at most 16,777,216"),
        ({"data": {"bpe_vocab_size": 10**18}}, "bpe_vocab_size must be at most 1,048,576, got"),
    ],
)
def test_numbers_past_all_machines(source: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(source, **setting)


@pytest.mark.usefixtures("unchecked")
def test_numbers_past_all_machines_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, finished: Path, source: Path, tmp_path: Path
) -> None:
    huge = str(10**18)
    write_json(tmp_path / "a.json", settings(source))
    train = ("train", str(tmp_path / "run"), "--config", str(tmp_path / "a.json"))
    for command, message in (
        ((*train, "--threads", huge), "threads must be at most 1,024"),
        ((*train, "--batch-size", huge), "a batch (batch_size times accumulate times context) must fit into memory"),
        ((*train, "--model.vocab-size", huge), "vocab_size must be at most 16,777,216"),
        ((*train, "--model.vocab-size", "16777216", "--model.dim", "1048576"), "the model must fit into memory"),
        (("bench", "bar", "--threads", huge, "--out", str(tmp_path / "out")), "threads must be at most 1,024"),
        (("bench", "gradients", "--threads", huge, "--out", str(tmp_path / "out")), "threads must be at most 1,024"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and message in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    main(["evaluate", str(finished), "--batch-size", huge])
    assert "nats per token" in capsys.readouterr().out


def test_the_batch_of_an_evaluation(finished: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = load(finished).model, load_corpus(DataConfig(source=str(source)))
    having(monkeypatch, 8 * 4 * 16 * 256 - 1)
    evaluate(model, corpus, batch_size=3, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"the logits of a batch .* must fit into memory"):
        evaluate(model, corpus, batch_size=4, device=torch.device("cpu"))


def test_a_small_published_checkpoint_makes_no_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    given = vector("cc")
    with pytest.raises(UserError, match=r"h\.2\.compress\.weight, .* and [\d,]+ more are missing") as caught:
        load_published(given.config | {"num_hidden_layers": 10_000_000}, given.parameters)
    assert len(str(caught.value)) < 1500
    having(monkeypatch, 256 * MIB)
    with pytest.raises(UserError, match=r"the published model must fit into memory: at least 1.00 GiB"):
        load_published(given.config | {"block_size": 1 << 24}, given.parameters)


def test_tensors_that_only_look_large_are_refused_before_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expanded tensor is a few bytes in a file of PyTorch's."""
    given = vector("cc")
    rows = 1 << 20
    seeming = torch.zeros(1, 32).expand(rows, 32)
    having(monkeypatch, 100 * MIB)
    with pytest.raises(UserError, match=r"the published model must fit into memory: at least 0.13 GiB"):
        load_published(given.config | {"vocab_size": rows}, given.parameters | {"transformer.wte.weight": seeming})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 10_000_000}, r"does not fit config.json, .* of 10,000,000 layers and [\d,]+ numbers: it holds"),
        ({"dim": 1 << 22}, r"does not fit config.json, .* of 1 layers and [\d,]+ numbers: it holds \d+ tensors of"),
        ({"context": 1 << 24, "rope_fraction": 1.0, "head_dim": 1 << 20}, "does not fit config.json"),
        ({"context": 1 << 24}, "the model of .* must fit into memory"),
    ],
)
def test_a_run_whose_settings_name_a_larger_model_than_its_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    plain = json.loads((finished / "config.json").read_text())
    plain["model"] |= changes
    write_json(tmp_path / "config.json", plain)
    for name in ("checkpoint.safetensors", "environment.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    having(monkeypatch, 256 * MIB)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_file_larger_than_memory_is_not_read(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"what .*checkpoint.safetensors holds must fit into memory"):
        load(finished)
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UserError, match=r"what .*model.safetensors holds must fit into memory"):
        read_published(tmp_path)

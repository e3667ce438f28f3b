"""`deepdelta import`: from a folder with a published checkpoint to a run that the other commands take."""

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import deepdelta
from deepdelta import GPT, PRESETS, GPTConfig, UserError
from deepdelta.cli import main
from deepdelta.data import DataConfig, batch, load_corpus
from deepdelta.interop import load_published, to_published
from deepdelta.interop.checkpoint import HOLDERS, WEIGHTS, read_published
from deepdelta.interop.published import plain_names
from deepdelta.training import import_published
from test_oracle import vector
from tiny_runs import rows


def checkpoint(folder: Path, name: str = "cc-ec", weights: str = "model.safetensors") -> Path:
    given = vector(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(given.config))
    if weights.endswith("safetensors"):
        save_file(given.parameters, folder / weights)
    else:  # their state dict: an OrderedDict in which the tied head stands beside the embedding
        state = OrderedDict(given.parameters)
        state["lm_head.weight"] = state["transformer.wte.weight"]
        torch.save(state, folder / weights)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    progress, found, message = capsys.readouterr().err.partition("error: ")
    assert found and "Traceback" not in progress + message
    return message


def ids_file(path: Path, vocab_size: int, count: int = 1500) -> Path:
    np.random.default_rng(0).integers(0, vocab_size, count).astype("<u2").tofile(path)
    return path


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_run_that_loads_as_the_published_model(tmp_path, capsys, weights):
    folder = checkpoint(tmp_path / "published", weights=weights)
    main(["import", str(folder), "--run", str(tmp_path / "run")])
    given = vector("cc-ec")
    expected = load_published(given.config, given.parameters)
    count = sum(parameter.numel() for parameter in expected.parameters())
    assert f"holds the published model: {count:,} parameters" in capsys.readouterr().out
    loaded = deepdelta.load(tmp_path / "run")
    assert loaded.tokenizer is None and not loaded.model.training and loaded.model.config == expected.config
    state = expected.state_dict()
    assert loaded.model.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[key]) for key, tensor in loaded.model.state_dict().items())
    assert to_published(loaded.model).keys() == given.parameters.keys()
    by_text = import_published(str(folder), str(tmp_path / "by text"), None)
    assert all(tensor.equal(state[key]) for key, tensor in by_text.state_dict().items())
    assert deepdelta.load(str(tmp_path / "by text")).model.config == expected.config


def test_the_keys_that_transformers_writes_are_taken(tmp_path):
    """What `save_pretrained` of the published classes leaves in config.json, bookkeeping included."""
    folder = checkpoint(tmp_path / "published")
    keys = json.loads((folder / "config.json").read_text())
    keys |= {
        "architectures": ["GPT"],
        "bias": False,
        "ddl_beta_hidden_size": 128,
        "ddl_beta_init": 1.0,
        "ddl_beta_single_linear": True,
        "ddl_k_eps": 1e-05,
        "ddl_state_dv_shortconv_causal": False,
        "ddl_state_read_init": None,
        "ddl_state_shortconv_kernel_size": 4,
        "ddl_v_constant": False,
        "ddl_v_constant_value": 2.0,
        "ddl_v_sigmoid": True,
        "ddl_v_sigmoid_scale": 4.0,
        "ddl_value_channels": 4,
        "dropout": 0.0,
        "dtype": "float32",
        "embedding_init_std": 0.02,
        "hidden_init_std_factor": 0.5,
        "input_embed_shortconv_kernel_size": 4,
        "k_activation": None,
        "model_type": "nanogpt-pro",
        "q_activation": None,
        "rope_ratio": 1.0,
        "scale_attn_by_inverse_layer_idx": False,
        "transformers_version": "4.57.3",
        "use_k_shift": False,
        "use_output_gate": False,
        "use_qk_rmsnorm": True,
        "use_v_shift": False,
        "using_groupnorm": False,
        "v_activation": None,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    given = vector("cc-ec")
    model = import_published(folder, tmp_path / "run", None)
    assert model.config == load_published(given.config, given.parameters).config


def test_evaluating_on_bare_ids(tmp_path, capsys):
    """The loss over every validation token, window by window, recomputed from the published tensors."""
    source = ids_file(tmp_path / "ids.bin", 97)
    main(["import", str(checkpoint(tmp_path / "cc")), "--run", str(tmp_path / "run"), "--source", str(source)])
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--device", "cpu"])
    printed = capsys.readouterr().out
    given = vector("cc-ec")
    model = load_published(given.config, given.parameters)
    held = torch.from_numpy(np.fromfile(source, "<u2").astype(np.int64))[1350:]
    losses = []
    for start in range(0, len(held) - 1, 64):
        piece = held[start : start + 65]
        losses.append(F.cross_entropy(model(piece[None, :-1]).logits[0], piece[1:], reduction="none"))
    assert f"loss            {torch.cat(losses).mean():.4f} nats per token" in printed
    assert "on 149 tokens, the whole validation split" in printed and "bits per byte" not in printed


def test_ids_beyond_the_model_are_refused(tmp_path, capsys):
    folder = checkpoint(tmp_path / "cc")
    source = ids_file(tmp_path / "ids.bin", 300)
    message = refused(capsys, "import", folder, "--run", tmp_path / "run", "--source", source)
    assert "97" in message and str(source) in message
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_a_token_to_predict_is_refused(tmp_path, capsys):
    folder, source = checkpoint(tmp_path / "cc"), ids_file(tmp_path / "ids.bin", 97, count=10)
    message = refused(capsys, "import", folder, "--run", tmp_path / "run", "--source", source)
    assert message == f"{source} must hold out at least 2 tokens for validation, got 1; give more of it.\n"
    assert not (tmp_path / "run").exists()


def byte_model(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """A model of ours over the 256 bytes, exported as the authors' code would save it."""
    config = GPTConfig(vocab_size=256, context=16, layers=1, heads=2, dim=16, residual=PRESETS["code-tc"])
    model = GPT(config, seed=5)
    keys = {"vocab_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "head_dim": 8}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys | {"block_size": 16}))
    save_file(to_published(model), folder / "model.safetensors")
    return model, keys


def test_evaluating_on_text_with_a_tokenizer(tmp_path, capsys):
    byte_model(tmp_path / "bytes")
    (tmp_path / "text.txt").write_text("one gate for erase and write; " * 60)
    command = ["import", str(tmp_path / "bytes"), "--run", str(tmp_path / "run"), "--source"]
    main([*command, str(tmp_path / "text.txt")])
    main(["evaluate", str(tmp_path / "run"), "--device", "cpu"])
    assert "bits per byte" in capsys.readouterr().out
    assert deepdelta.load(tmp_path / "run").tokenizer is not None
    main(["generate", str(tmp_path / "run"), "--prompt", "one", "--tokens", "3"])
    assert capsys.readouterr().out.startswith("one")
    (tmp_path / "text.txt").write_text("another text than the imported one " * 60)
    assert "another corpus" in refused(capsys, "evaluate", tmp_path / "run", "--device", "cpu")


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path, capsys):
    folder = checkpoint(tmp_path / "cc")
    (tmp_path / "text.txt").write_text("bytes need 256 rows " * 60)
    message = refused(capsys, "import", folder, "--run", tmp_path / "run", "--source", tmp_path / "text.txt")
    assert message == "the corpus has 256 ids, the imported model only 97.\n"
    assert not (tmp_path / "run").exists()


def test_evaluating_without_a_corpus_says_what_to_do(tmp_path, capsys):
    main(["import", str(checkpoint(tmp_path / "cc")), "--run", str(tmp_path / "run")])
    run = tmp_path / "run"
    onward = f"train --run NEW --config {run / 'config.json'} --init-from {run} --data.source TEXT"
    assert f"Next: deepdelta {onward}\n" in capsys.readouterr().out
    assert "imported without a corpus; import it again with --source" in refused(capsys, "evaluate", run)
    said = refused(capsys, "generate", run, "--prompt", "a")
    assert "was imported without a text, so it keeps no tokenizer; import the model again, into another --run" in said


def test_a_tokenizer_without_its_text_is_refused(tmp_path, capsys):
    given = ("--run", tmp_path / "run", "--tokenizer", "file.json")
    message = refused(capsys, "import", checkpoint(tmp_path / "cc"), *given)
    assert message == "--tokenizer belongs to the text of --source; give that too, or leave it out.\n"
    assert not (tmp_path / "run").exists()


def test_training_from_an_imported_model(tmp_path, unchecked):
    source = ids_file(tmp_path / "ids.bin", 97)
    imported = tmp_path / "imported"
    main(["import", str(checkpoint(tmp_path / "cc")), "--run", str(imported), "--source", str(source)])
    command = ["train", "--run", str(tmp_path / "new"), "--init-from", str(imported)]
    command += ["--config", str(imported / "config.json"), "--steps", "2", "--batch-size", "2", "--warmup", "1"]
    main([*command, "--device", "cpu", "--threads", "1", "--eval-every", "2"])
    given = vector("cc-ec")
    model = load_published(given.config, given.parameters)
    corpus = load_corpus(DataConfig(source=str(source), bin_vocab_size=97))
    inputs, labels = batch(corpus.train, seed=0, step=0, rank=0, batch_size=2, context=64)
    recorded = [row["loss"] for row in rows(tmp_path / "new") if "loss" in row]
    assert recorded[0] == pytest.approx(model(inputs, labels).loss.item(), rel=1e-6)
    assert len(recorded) == 2 and recorded[1] != recorded[0]
    trained = deepdelta.load(tmp_path / "new").model.state_dict()
    assert all(not trained[key].equal(tensor) for key, tensor in model.state_dict().items())


def test_training_from_another_architecture_names_the_tensors(tmp_path, capsys, unchecked):
    source = ids_file(tmp_path / "ids.bin", 97)
    main(["import", str(checkpoint(tmp_path / "cc")), "--run", str(tmp_path / "run")])
    command: list[str | Path] = ["train", "--run", tmp_path / "new", "--init-from", tmp_path / "run"]
    command += ["--data.source", source, "--device", "cpu", "--model.context", "16", "--model.layers", "2"]
    command += ["--model.heads", "2", "--model.dim", "32"]
    message = refused(capsys, *command)
    assert "does not fit this model" in message and "unknown tensors" in message and "missing tensors" in message
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_run_is_never_overwritten(tmp_path, capsys):
    folder = checkpoint(tmp_path / "cc")
    main(["import", str(folder), "--run", str(tmp_path / "run")])
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    assert "already holds a run" in refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


class Payload:
    """Makes a folder when unpickled by a reader that runs the code of what it reads."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "beside the tensors"])
@pytest.mark.parametrize("weights", [name for name in WEIGHTS if not name.endswith("safetensors")])
def test_code_in_a_state_dict_is_not_run(tmp_path, capsys, form, weights):
    folder, trace = checkpoint(tmp_path / "cc", weights=weights), tmp_path / "trace"
    if form == "bare pickle":
        (folder / weights).write_bytes(pickle.dumps(Payload(trace), protocol=2))
    else:
        held: Any = vector("cc-ec").parameters | {"x": Payload(trace)} if form.startswith("beside") else Payload(trace)
        torch.save(held, folder / weights, _use_new_zipfile_serialization=form != "legacy")
    message = refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert "holds more than tensors" in message and "model.safetensors" in message and weights in message
    assert not trace.exists() and not (tmp_path / "run").exists()
    if form == "bare pickle":
        pickle.loads((folder / weights).read_bytes())
    else:
        torch.load(folder / weights, weights_only=False)
    assert trace.exists(), "the file is harmless, so this test shows nothing"


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
def test_truncated_files(tmp_path, capsys, weights):
    folder = tmp_path / "cc"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5.0)}
    name = weights.replace("legacy", "pytorch_model")
    if weights == "model.safetensors":
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=weights != "legacy.bin")
    whole = (folder / name).read_bytes()
    for length in [*range(0, 60), *range(60, len(whole) - 1, 17)]:
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=str(folder / name)):
            read_published(folder)
    (folder / name).write_bytes(whole)
    assert read_published(folder)[1]["a"].equal(tensors["a"])
    (folder / name).write_bytes(whole[:100])
    assert name in refused(capsys, "import", folder, "--run", tmp_path / "run")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's word on a damaged byte, before it gives up
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_damaged_files_are_refused_or_read_never_a_crash(tmp_path, form):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(3, 4), "b": torch.arange(5.0)}, file, _use_new_zipfile_serialization=form == "zip")
    whole, draw, refusals = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.integers(len(whole))] = draw.integers(256)
        file.write_bytes(damaged)
        try:
            read_published(tmp_path)
        except UserError:
            refusals += 1
    assert refusals > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold the model's config.json"),
        (b"{", "config.json must hold a JSON object, but is damaged"),
        (b"\xff\xfe", "config.json must hold a JSON object, but is damaged"),
        (b"[1]", "config.json must hold a JSON object, got list"),
        (b'{"n_layer": 2}', "unknown configuration key 'n_layer'"),
    ],
)
def test_the_configuration_file(tmp_path, capsys, content, message):
    folder = checkpoint(tmp_path / "cc")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    assert message in refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_weights_or_no_folder(tmp_path, capsys):
    folder = checkpoint(tmp_path / "cc")
    (folder / "model.safetensors").unlink()
    message = refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert all(name in message for name in WEIGHTS)
    assert "config.json" in refused(capsys, "import", tmp_path / "nowhere", "--run", tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"net": {"a": torch.zeros(2)}}, {"a": torch.zeros(2), "step": 3}, {1: torch.zeros(2)}],
)
def test_a_state_dict_must_be_tensors_by_name(tmp_path, capsys, content):
    folder = checkpoint(tmp_path / "cc", weights="pytorch_model.bin")
    torch.save(content, folder / "pytorch_model.bin")
    message = refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert "must hold a dictionary of tensors by name, alone or under one of the keys model, state_dict, " in message


def same_as_published(run: Path, name: str = "cc-ec") -> None:
    given = vector(name)
    there, here = load_published(given.config, given.parameters).state_dict(), deepdelta.load(run).model.state_dict()
    assert there.keys() == here.keys() and all(tensor.equal(here[key]) for key, tensor in there.items())


@pytest.mark.parametrize("key", HOLDERS)
def test_a_state_dict_among_what_a_training_program_keeps(tmp_path, key):
    folder = checkpoint(tmp_path / "cc", weights="checkpoint.pt")
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({key: vector("cc-ec").parameters, "optimizer": optimizer, "iter_num": 3}, folder / "checkpoint.pt")
    import_published(folder, tmp_path / "run", None)
    same_as_published(tmp_path / "run")


WRAPPERS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of compiled": lambda name: f"module._orig_mod.{name}",
    "compiled DDP in a trainer": lambda name: f"model._orig_mod.module.{name}",
    "compiled blocks": lambda name: name.replace("transformer.h.1.", "transformer.h.1._orig_mod."),
    "checkpointed and sharded blocks": lambda name: name.replace(
        "transformer.h.0.", "transformer.h.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_wrappers_put_into_names_is_left_out(tmp_path, wrapper):
    folder, tensors = checkpoint(tmp_path / "cc"), vector("cc-ec").parameters
    wrapped = {WRAPPERS[wrapper](name): tensor for name, tensor in tensors.items()}
    assert wrapped.keys() != tensors.keys()
    save_file(wrapped, folder / "model.safetensors")
    import_published(folder, tmp_path / "run", None)
    same_as_published(tmp_path / "run")


def test_a_real_wrapper_s_names():
    held = torch.nn.ModuleDict({"h": torch.nn.Linear(2, 3)})
    wrapped = torch.nn.DataParallel(held).state_dict()
    assert wrapped.keys() != held.state_dict().keys() == plain_names(wrapped).keys()


def test_two_tensors_of_one_name(tmp_path, capsys):
    folder, tensors = checkpoint(tmp_path / "cc"), vector("cc-ec").parameters
    save_file(tensors | {"_orig_mod.ln_f.weight": tensors["ln_f.weight"].clone()}, folder / "model.safetensors")
    message = refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert "'ln_f.weight'" in message and "'_orig_mod.ln_f.weight'" in message and "leave one out" in message


def shards(folder: Path, form: str) -> Path:
    """The checkpoint in two files and a list of them, as transformers writes it."""
    folder = checkpoint(folder)
    (folder / "model.safetensors").unlink()
    stem, ending = form.split(".")
    files = [f"{stem}-{number:05}-of-00002.{ending}" for number in (1, 2)]
    tensors = vector("cc-ec").parameters
    halves = dict(zip(files, (dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])), strict=True))
    for file, half in halves.items():
        if ending == "bin":
            torch.save(half, folder / file)
        else:
            save_file(half, folder / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / f"{form}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_in_several_files(tmp_path, form):
    import_published(shards(tmp_path / "cc", form), tmp_path / "run", None)
    same_as_published(tmp_path / "run")


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({}, "must list the files of the tensors under 'weight_map'"),
        ({"weight_map": ["a"]}, "must list the files of the tensors under 'weight_map'"),
        ({"weight_map": {"a": "absent.safetensors"}}, "must list files beside it, but 'absent.safetensors' is none"),
        (
            {"weight_map": {"a": "../other.safetensors"}},
            "must list files beside it, but '../other.safetensors' is none",
        ),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "lists 'a', which none of its files"),
    ],
)
def test_a_list_of_files_that_does_not_hold(tmp_path, capsys, listed, message):
    folder = shards(tmp_path / "cc", "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    assert message in refused(capsys, "import", folder, "--run", tmp_path / "run")


def test_a_tensor_in_two_files(tmp_path, capsys):
    folder, tensors = shards(tmp_path / "cc", "model.safetensors"), vector("cc-ec").parameters
    save_file(tensors, folder / "model-00002-of-00002.safetensors")
    message = refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert "model-00002-of-00002.safetensors holds '" in message and "which another file of" in message


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, capsys, value):
    folder, tensors = checkpoint(tmp_path / "cc"), vector("cc-ec").parameters
    broken = tensors["transformer.h.1.ln_2.weight"].clone()
    broken[3] = value
    save_file(tensors | {"transformer.h.1.ln_2.weight": broken}, folder / "model.safetensors")
    message = refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert message.startswith(
        "a published checkpoint must hold finite weights, but 'transformer.h.1.ln_2.weight' holds"
    )
    assert not (tmp_path / "run").exists()


def test_safetensors_are_preferred(tmp_path):
    folder = checkpoint(tmp_path / "cc")
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    assert "ln_f.weight" in read_published(folder)[1]


def test_what_a_constant_target_leaves_unused_is_kept_in_the_run(tmp_path):
    """The published `v_proj` of a constant target survives import, loading and export."""
    import_published(checkpoint(tmp_path / "published", "aside-constant"), tmp_path / "run", None)
    given = vector("aside-constant").parameters
    exported = to_published(deepdelta.load(tmp_path / "run").model)
    assert any("v_proj" in name for name in given)
    assert exported.keys() == given.keys()
    assert all(torch.equal(exported[name], given[name]) for name in given)

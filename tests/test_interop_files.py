"""The files of a published checkpoint: in which forms they are read, and what is refused, code in them above all."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import deepdelta
from checkpoints import checkpoint, refused
from deepdelta import UserError
from deepdelta.interop import load_published
from deepdelta.interop.checkpoint import HOLDERS, WEIGHTS, read_published
from deepdelta.interop.published import plain_names
from deepdelta.training import import_published
from test_oracle import vector


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

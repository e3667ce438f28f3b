"""Imported published models give the published code's logits, loss and gradients (tests/oracle)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deepdelta import GPT, UserError
from deepdelta.interop import load_published, to_published

FOLDER = Path(__file__).parent / "oracle"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
SHARED = FOLDER.parents[2] / "shared" / "oracle"
"""Where the seven come from; beside the repository in the project's own checks, absent elsewhere."""


class Vector(NamedTuple):
    config: dict[str, Any]
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    tensors: dict[str, Tensor]


def vector(name: str) -> Vector:
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return Vector(
        json.loads((FOLDER / f"{name}.json").read_text())["config"],
        {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")},
        {key.removeprefix("grad."): value for key, value in tensors.items() if key.startswith("grad.")},
        tensors,
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest absolute value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def backward(model: GPT, given: Vector) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    output = model(given.tensors["input_ids"], labels=given.tensors["labels"])
    output.loss.backward()
    return output.logits, output.loss, to_published(model, grads=True)


def test_all_twelve_are_here():
    assert len(NAMES) == 12 and sum(name.startswith("aside-") for name in NAMES) == 5


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared files are not beside this repository")
def test_the_copies_are_the_project_s_files():
    originals = sorted(SHARED.glob("*.safetensors")) + sorted(SHARED.glob("*.json"))
    assert len(originals) == 14
    for file in originals:
        assert (FOLDER / file.name).read_bytes() == file.read_bytes(), file.name


# A gradient of one element is a sum over tokens that cancels to a thousandth of its terms; the numbers allow 2e-4.
# In fp32 the order of a processor's sums alone moves it: weights moved by half a unit in the last place spread it by
# 1.2e-4 around the fp64 value. So fp64 is held to the stored numbers' tolerance and fp32 to five such spreads more.
ONE_ELEMENT = {torch.float64: 2e-4, torch.float32: 8e-4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_every_gradient(name, dtype):
    given = vector(name)
    logits, loss, gradients = backward(load_published(given.config, given.parameters).to(dtype), given)
    assert logits.dtype == dtype
    assert error(logits, given.tensors["logits"]) < 1e-5
    assert error(loss, given.tensors["loss"].reshape(())) < 1e-5
    assert gradients.keys() == given.gradients.keys()
    for key, expected in given.gradients.items():
        assert error(gradients[key], expected) < (ONE_ELEMENT[dtype] if expected.numel() == 1 else 5e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_equal(name):
    given = vector(name)
    model = load_published(given.config, given.parameters)
    back = to_published(model)
    assert back.keys() == given.parameters.keys()
    for key, tensor in back.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.equal(given.parameters[key]), key
    again = load_published(given.config, back)
    assert all(tensor.equal(model.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_every_parameter_of_the_model_has_a_published_name():
    for name in NAMES:
        given = vector(name)
        model = load_published(given.config, given.parameters)
        assert sum(tensor.numel() for tensor in to_published(model).values()) == sum(
            parameter.numel() for parameter in model.parameters()
        ) + sum(tensor.numel() for tensor in model.unused_published.values())


# Keys that decide nothing once the tensors are given: the gate's start, and what the published forward ignores.
WITHOUT_EFFECT = {"ddl_beta_init", "ddl_state_dv_shortconv_causal"}
# Bookkeeping of the numbers above rather than of the model.
SAME = {"block_size", "name", "variant"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("aside-")])
def test_no_configuration_key_is_ignored(name):
    """Each further configuration tells its settings from the defaults: leaving out a key is refused or shows."""
    given = vector(name)
    told = 0
    for key in given.config.keys() - SAME - WITHOUT_EFFECT:
        less = {other: value for other, value in given.config.items() if other != key}
        try:
            model = load_published(less, given.parameters)
        except UserError:
            told += 1
            continue
        if model.config == load_published(given.config, given.parameters).config:
            continue  # the key spells out its default
        logits, _, _ = backward(model, given)
        assert error(logits, given.tensors["logits"]) > 1e-4, key
        told += 1
    assert told >= 4


def test_keys_without_effect_have_none():
    given = vector("cc-ec")
    expected = backward(load_published(given.config, given.parameters), given)[0]
    for change in (
        {"ddl_state_dv_shortconv_causal": True},
        {"ddl_state_read_init": 0.7},
        *({"ddl_beta_init": start} for start in (-1.0, 0.0, 0.3, 2.0)),
        {"hidden_init_std_factor": 2.0, "embedding_init_std": 1.0},
    ):
        assert backward(load_published(given.config | change, given.parameters), given)[0].equal(expected), change


def test_the_model_is_a_copy():
    """The loaded model does not share memory with the tensors it was made of."""
    given = vector("tc-ec")
    before = {key: tensor.clone() for key, tensor in given.parameters.items()}
    model = load_published(given.config, given.parameters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(given.parameters[key].equal(tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["aside-constant", "aside-scalar-constant"])
def test_a_constant_target_keeps_what_it_does_not_use(name):
    given = vector(name)
    model = load_published(given.config, given.parameters)
    unused = {key for key in given.parameters if ".v_proj." in key}
    assert unused and model.unused_published.keys() == unused and not unused & given.gradients.keys()
    assert not any(key.startswith("unused") for key in model.state_dict())

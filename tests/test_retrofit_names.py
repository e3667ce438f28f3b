"""What is saved of a retrofit is what it had, whatever was wrapped around its parts or put in their place since."""

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

from deepdelta import UserError, load_retrofit, retrofit, retrofitted, save_retrofit, undo_retrofit
from retrofit_models import FAMILIES, made, moved, open_gates, output, tensors_file


def with_each_layer(change: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        for i, layer in enumerate(model.layers):
            model.layers[i] = change(layer)
        return model

    return apply


def normed(layer: nn.Module) -> nn.Module:
    parametrizations.weight_norm(layer.linear1)
    parametrizations.weight_norm(layer.delta.attention.erase_gate.outer)
    return layer


COMPILES = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@COMPILES
@pytest.mark.parametrize("trainable", ["all", "residual"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.compile(model, backend="eager"),
        with_each_layer(lambda layer: torch.compile(layer, backend="eager")),
        with_each_layer(checkpoint_wrapper),
        with_each_layer(normed),
    ],
    ids=["compile", "compile a layer", "checkpoint", "weight norm"],
)
def test_names_that_change_after_the_retrofit_are_written_as_they_were(change, trainable, tmp_path):
    model, x = moved("post-norm", trainable=trainable), FAMILIES["post-norm"].x
    save_retrofit(model, tmp_path)
    expected = load_file(tensors_file(tmp_path))
    assert len(expected) == (31 if trainable == "residual" else 69)
    another = change(copy.deepcopy(model))
    assert dict(retrofitted(another).added) == dict(retrofitted(model).added)
    save_retrofit(another, tmp_path)
    torch.testing.assert_close(load_file(tensors_file(tmp_path)), expected, rtol=1e-6, atol=1e-6)
    again = load_retrofit(made("post-norm"), tmp_path)
    torch.testing.assert_close(again(x), model(x))


@COMPILES
def test_a_compiled_model_is_retrofitted_as_the_plain_one(tmp_path, unchecked):
    x = FAMILIES["layer"].x
    plain = moved("layer", trainable="residual")
    compiled = torch.compile(made("layer"), backend="eager")
    before = compiled(x)
    retrofit(compiled, seed=0, trainable="residual")
    open_gates(compiled)
    torch.testing.assert_close(compiled(x), plain(x))
    assert dict(retrofitted(compiled).added) == dict(retrofitted(plain).added) and not before.equal(plain(x))
    save_retrofit(compiled, tmp_path)
    assert output(load_retrofit(made("layer"), tmp_path), x).equal(output(plain, x))
    another = load_retrofit(torch.compile(made("layer"), backend="eager"), tmp_path)
    assert all(one.equal(two) for one, two in zip(another.parameters(), plain.parameters(), strict=True))
    torch.testing.assert_close(undo_retrofit(compiled)(x), before)


def test_a_parametrized_model_takes_values_by_the_inverse(tmp_path):
    model = moved("post-norm")
    save_retrofit(model, tmp_path)
    another = made("post-norm", seed=3)
    parametrizations.weight_norm(another.layers[1].linear1)
    load_retrofit(another, tmp_path)
    torch.testing.assert_close(another.layers[1].linear1.weight, model.layers[1].linear1.weight)
    torch.testing.assert_close(output(another, FAMILIES["post-norm"].x), output(model, FAMILIES["post-norm"].x))


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_a_parametrization_without_an_inverse_is_named_and_nothing_is_filled(tmp_path):
    save_retrofit(moved("post-norm"), tmp_path)
    model = made("post-norm", seed=3)
    parametrize.register_parametrization(model.layers[1].linear1, "weight", Halved())
    expected = output(model, FAMILIES["post-norm"].x)
    with pytest.raises(UserError, match=r"'layers.1.linear1.weight' is computed by a parametrization without"):
        load_retrofit(model, tmp_path)
    assert output(model, FAMILIES["post-norm"].x).equal(expected)


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.layers[0].delta.attention.erase_gate.outer, "weight", 0.5)


def grown(model: nn.Module) -> None:
    model.head = nn.Linear(2, 2)


def emptied(model: nn.Module) -> None:
    model.layers[1].to_empty(device="meta")


def shortened(model: nn.Module) -> None:
    model.layers = model.layers[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pruned, r"missing now are \['layers.0.*outer.weight'\], new are \['layers.0.*weight_mask', .*pruning"),
        (grown, r"missing now are \[\], new are \['head.bias', 'head.weight'\]"),
        (shortened, r"missing now are \['layers.2.delta"),
        (emptied, "must hold its values, and 'layers.1.* is on the device meta"),
    ],
)
def test_what_is_not_found_any_more_leaves_the_old_file(change, message, tmp_path):
    model = moved("post-norm", trainable="residual")
    save_retrofit(model, tmp_path)
    file = tensors_file(tmp_path)
    change(model)
    with pytest.raises(UserError, match=message):
        save_retrofit(model, tmp_path)
    assert tensors_file(tmp_path) == file and len(load_file(file)) == 31


def test_what_was_unfrozen_by_hand_is_saved_and_is_so_again(tmp_path):
    model = moved("llama", trainable="residual")
    model.lm_head.requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight += 1
    save_retrofit(model, tmp_path)
    again = load_retrofit(made("llama"), tmp_path)
    assert output(again, FAMILIES["llama"].x).equal(output(model, FAMILIES["llama"].x))
    assert {name for name, one in again.named_parameters() if one.requires_grad} == {
        name for name, one in model.named_parameters() if one.requires_grad
    }

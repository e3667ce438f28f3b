"""A retrofit goes to a folder and comes back, or what is wrong is named; so is what cannot be retrofitted."""

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn

import deepdelta
from damage import flip
from deepdelta import PRESETS, UserError, load_retrofit, retrofit, retrofitted, save_retrofit, undo_retrofit
from deepdelta.config import to_plain
from deepdelta.retrofitting import saving
from deepdelta.tensors import save_tensors
from retrofit_models import FAMILIES, encoder, gpt2, llama, made, models, moved, open_gates, output, tensors_file
from tiny_runs import config, quietly, rows, text_file


@pytest.mark.parametrize("trainable", ["all", "residual"])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded(name, trainable, tmp_path):
    model = moved(name, value_channels=3, trainable=trainable, erase_init=0.4)
    save_retrofit(model, tmp_path / "there")
    # With all of its weights saved, those of the model that loads them do not matter.
    again = load_retrofit(made(name, seed=0 if trainable == "residual" else 7), tmp_path / "there")
    assert output(again, FAMILIES[name].x).equal(output(model, FAMILIES[name].x))
    one, two = retrofitted(model), retrofitted(again)
    assert (one.config, dict(one.added), one.trained) == (two.config, dict(two.added), two.trained)
    assert one.config.erase_init == 0.4
    kept = load_file(tensors_file(tmp_path / "there"))
    assert (len(kept) < len(model.state_dict()) / 1.2) == (trainable == "residual")
    assert sorted(file.name for file in (tmp_path / "there").iterdir()) == [
        tensors_file(tmp_path / "there").name,
        "retrofit.json",
    ]


def test_statistics_of_batch_norms_are_saved_with_what_was_added(tmp_path):
    x = FAMILIES["basic"].x
    model = retrofit(made("basic"), trainable="residual")
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.train()
    for _ in range(3):
        output(model, x).square().mean().backward()
        optimizer.step()
    save_retrofit(model, tmp_path)
    again = load_retrofit(made("basic"), tmp_path)
    plain, counts = made("basic").state_dict(), again.state_dict()
    assert int(counts["bn1.num_batches_tracked"]) == int(plain["bn1.num_batches_tracked"]) + 3
    assert output(again.eval(), x).equal(output(model.eval(), x))


def test_a_second_save_replaces_the_first_and_an_interrupted_one_does_not(tmp_path, monkeypatch):
    model = moved("llama", trainable="residual")
    save_retrofit(model, tmp_path)
    first = tensors_file(tmp_path)
    open_gates(model, 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_retrofit(model, tmp_path)
    loaded = load_retrofit(made("llama"), tmp_path).get_parameter("model.layers.0.delta.mlp.erase_gate.opening")
    assert loaded.item() == pytest.approx(0.7)
    save_retrofit(model, tmp_path)
    assert tensors_file(tmp_path) != first
    loaded = load_retrofit(made("llama"), tmp_path).get_parameter("model.layers.0.delta.mlp.erase_gate.opening")
    assert loaded.item() == pytest.approx(0.2)


def test_the_state_dict_alone_restores_a_retrofit():
    model = moved("basic")
    again = retrofit(made("basic", seed=3), seed=5)
    again.load_state_dict(model.state_dict())
    assert output(again, FAMILIES["basic"].x).equal(output(model, FAMILIES["basic"].x))


def changed(folder: Path, change: Any) -> None:
    file = tensors_file(folder)
    tensors = load_file(file)
    change(tensors)
    save_tensors(file, tensors)


OPENING = "model.layers.0.delta.mlp.erase_gate.opening"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: changed(f, lambda t: t.pop(OPENING)), rf"missing tensors \['{OPENING}'\], unknown \[\]"),
        (lambda f: changed(f, lambda t: t.update(extra=torch.ones(1))), r"missing tensors \[\], unknown \['extra'\]"),
        (lambda f: changed(f, lambda t: t.update({OPENING: torch.ones(2)})), rf"'{OPENING}' has shape \(2,\) there"),
        (lambda f: changed(f, lambda t: t.update({OPENING: torch.tensor([math.nan])})), f"'{OPENING}' holds NaN"),
        (lambda f: tensors_file(f).write_bytes(b"short"), "truncated or damaged"),
        (lambda f: flip(tensors_file(f)), r"safetensors is damaged: .*checksum.*; restore a copy, or save the model"),
        (lambda f: tensors_file(f).unlink(), "cannot be read: No such file"),
        (lambda f: (f / "retrofit.json").unlink(), "holds no retrofit: it has no retrofit.json"),
        (lambda f: (f / "retrofit.json").write_text("{"), "must hold a JSON object, but is damaged"),
        (lambda f: (f / "retrofit.json").write_text("[]"), "must hold a JSON object, got list"),
        (
            lambda f: (f / "retrofit.json").write_text('{"versions": {"deepdelta": "0.1.0"}}'),
            "has format 0, and this version reads 1: read it with deepdelta 0.1.0",
        ),
        (
            lambda f: (f / "retrofit.json").write_text(
                json.dumps({"format": 1, "options": {}, "tensors": "../../secret"})
            ),
            "must hold the options and the tensors' file name",
        ),
        (
            lambda f: (f / "retrofit.json").write_text(
                (f / "retrofit.json").read_text().replace("erase_init", "erase_inti")
            ),
            "unknown key 'erase_inti'; did you mean 'erase_init'",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_the_model_stays_plain(spoil, message, tmp_path):
    save_retrofit(moved("llama"), tmp_path)
    spoil(tmp_path)
    model = made("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        load_retrofit(model, tmp_path)
    after = model.state_dict()
    assert list(after) == list(before) and all(after[key].equal(before[key]) for key in before)
    with pytest.raises(UserError, match="was not retrofitted"):
        retrofitted(model)


def test_another_architecture_does_not_take_it(tmp_path):
    save_retrofit(moved("llama"), tmp_path)
    with pytest.raises(UserError, match="does not fit this model: missing tensors"):
        load_retrofit(made("gpt2"), tmp_path)


# What cannot be retrofitted


class Wrapped(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside


class OwnForward(models.ResNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer1(x)


class OwnBlock(models.resnet.BasicBlock):
    pass


def twice() -> nn.Module:
    model = encoder()
    model.layers[1] = model.layers[0]
    return model


def stageless() -> nn.Module:
    model = made("basic")
    model.layer4 = nn.Identity()
    return model


def hooked(part: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """With a forward on the object, as libraries that spread a model over devices set it."""
    model = llama()
    module = part(model)
    module.forward = functools.partial(module.forward)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), r"no residual structure in Linear: it looked for the modules BertModel, "),
        (lambda: Wrapped(nn.LSTM(2, 2)), r"Encoder\. Describe its blocks with .*register, or wrap its branches with"),
        (lambda: type("ResNet", (nn.Linear,), {})(2, 2), "no residual structure in ResNet: it looked for the modules"),
        (
            lambda: nn.Transformer(8, 2, 1, 1, batch_first=True),
            r"TransformerDecoder \('decoder'\): .*retrofit the encoder alone",
        ),
        (lambda: nn.TransformerDecoderLayer(8, 2), "TransformerDecoderLayer .*also attends to a memory"),
        (lambda: OwnForward(models.resnet.BasicBlock, [1] * 4), "OwnForward has a forward of its own in place of Res"),
        (lambda: models.ResNet(OwnBlock, [1] * 4), "knows the blocks BasicBlock, Bottleneck in ResNet, got OwnBlock"),
        (stageless, "nn.Sequential of blocks, and layer4 is a Identity; wrap the branches"),
        (twice, "blocks that each stand in one place, and this TransformerEncoder runs one of them several times"),
        (
            lambda: deepdelta.GPT(deepdelta.GPTConfig(vocab_size=9, dim=8, heads=2)),
            "rule='additive_erase' and value_channels=4",
        ),
        (
            lambda: deepdelta.GPT(
                deepdelta.GPTConfig(
                    vocab_size=9,
                    dim=8,
                    heads=2,
                    residual=deepdelta.ResidualConfig(rule="additive", value_channels=1, compression="token"),
                )
            ),
            "retrofit takes a GPT with compression='channel', got 'token'",
        ),
        (lambda: retrofit(llama()), "the model has been retrofitted already; call deepdelta.undo_retrofit"),
        (lambda: Wrapped(retrofit(gpt2())), "its module 'inside' has been retrofitted already"),
        (lambda: retrofit(Wrapped(llama())).inside, "its module 'model.layers.0.delta' has been retrofitted already"),
        (
            lambda: hooked(lambda model: model.model.layers[1]),
            "LlamaDecoderLayer has a forward set on the object itself",
        ),
        (lambda: hooked(lambda model: model.model), "LlamaModel has a forward of its own in place of LlamaModel's"),
        (
            lambda: fx.symbolic_trace(made("basic")),
            "cannot see blocks in ResNet, which was traced .*looks for the modules ",
        ),
        pytest.param(
            lambda: torch.jit.script(nn.Linear(2, 2)),
            "cannot see blocks in RecursiveScriptModule, which was traced or",
            marks=pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
        ),
        (lambda: "llama", "takes a torch.nn.Module, got str"),
    ],
)
def test_what_is_refused(build, message, unchecked):
    model = build()
    keys = list(model.state_dict()) if isinstance(model, nn.Module) else []
    with pytest.raises(UserError, match=message):
        retrofit(model)
    if keys:
        assert list(model.state_dict()) == keys


def test_a_later_stack_that_is_refused_leaves_the_earlier_ones_plain():
    model = nn.ModuleList([encoder(), twice()])
    keys, kinds = list(model.state_dict()), [type(part) for part in model.modules()]
    with pytest.raises(UserError, match="several times"):
        retrofit(model)
    assert (list(model.state_dict()), [type(part) for part in model.modules()]) == (keys, kinds)
    assert model[0].use_nested_tensor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"erase_inti": 1.0}, "retrofit: unknown key 'erase_inti'; did you mean 'erase_init'"),
        ({"rule": "delta"}, "retrofit: unknown key 'rule'; known are: .*erase_init"),
        ({"trainable": "gates"}, "retrofit: trainable: .*'all' or 'residual', got 'gates'"),
        ({"value_channels": 0}, r"retrofit: value_channels must lie in \[1, 4096\], got 0"),
        ({"value_channels": 2.0}, "retrofit: value_channels: .*integer, got 2.0"),
        ({"erase_init": 2.5}, r"retrofit: erase_init must lie in \[0, 2\], got 2.5"),
    ],
)
def test_options_are_refused_by_name(options, message, unchecked):
    model = llama()
    with pytest.raises(UserError, match=message):
        retrofit(model, **options)
    retrofit(model, gate="constant")


@pytest.mark.parametrize("use", [retrofitted, undo_retrofit, lambda model: save_retrofit(model, "nowhere")])
def test_a_plain_model_has_nothing_to_tell(use):
    with pytest.raises(UserError, match="this LlamaForCausalLM was not retrofitted: give the module that"):
        use(llama())
    with pytest.raises(UserError, match="this LlamaModel was not retrofitted"):
        use(retrofit(llama()).model)
    assert not Path("nowhere").exists()


def test_two_stacks_in_one_model():
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": encoder(), "two": nn.Sequential(encoder().layers[0], encoder().layers[1])}).eval()
    plain = copy.deepcopy(model)
    report = retrofitted(retrofit(model, 2, seed=0))
    assert report.families == ("TransformerEncoder", "TransformerEncoderLayer", "TransformerEncoderLayer")
    assert list(report.added) == ["one.layers.0", "one.layers.1", "one.layers.2", "two.0", "two.1"]
    x = FAMILIES["post-norm"].x
    with torch.no_grad():
        for part in ("one", "two"):
            torch.testing.assert_close(model[part](x), plain[part](x), rtol=0, atol=1e-5)
    gates = [
        parameter for name, parameter in model.named_parameters() if name.endswith("attention.erase_gate.outer.weight")
    ]
    assert not any(one.equal(two) for i, one in enumerate(gates) for two in gates[:i])


# Training that goes on from a plain run


def test_a_run_starts_from_a_plain_one_as_its_retrofit(tmp_path):
    source = text_file(tmp_path / "text.txt")
    reference, additive = {"backend": "reference", "seed": 3}, {"residual": to_plain(PRESETS["additive"])}
    quietly(config(source, **reference, steps=8, model=additive), tmp_path / "plain")
    model, x = deepdelta.load(tmp_path / "plain").model, torch.arange(12)[None]
    residual = {"residual": to_plain(PRESETS["retrofit"])}
    retrofitted_run = config(source, **reference, steps=4, model=residual)
    quietly(retrofitted_run, tmp_path / "new", init_from=tmp_path / "plain")
    quietly(config(source, **reference, steps=4, model=additive), tmp_path / "on", init_from=tmp_path / "plain")
    # The first step sees the same batch and the same function; from the second on it is another one.
    first, second = ([row["loss"] for row in rows(tmp_path / name)[:4]] for name in ("new", "on"))
    assert first[0] == pytest.approx(second[0], abs=1e-6) and first[0] != pytest.approx(first[3], abs=1e-3)
    assert first[3] != pytest.approx(second[3], abs=1e-6)
    new = deepdelta.load(tmp_path / "new").model
    assert new.config.residual == PRESETS["retrofit"]
    assert all(residual.erase_gate.opening.item() != 0 for residual in new.residuals())
    assert not output(new, x).equal(output(model, x))
    # Some of a delta model's parts are missing, or all of its sizes are others: refused.
    for changes, message in (
        ({"residual": residual["residual"] | {"norm": "none"}}, r"unknown tensors \['layers.0.attention.norm.weight'"),
        (residual | {"dim": 8}, "'embedding.weight' has shape"),
    ):
        with pytest.raises(UserError, match=message):
            quietly(config(source, model=changes), tmp_path / "other", init_from=tmp_path / "plain")
    erasing = to_plain(PRESETS["retrofit"]) | {"plain_start": False}
    quietly(config(source, **reference, steps=2, model={"residual": erasing}), tmp_path / "erasing")
    with pytest.raises(UserError, match=r"missing tensors \['layers.0.attention.erase_gate.opening'"):
        quietly(retrofitted_run, tmp_path / "other", init_from=tmp_path / "erasing")

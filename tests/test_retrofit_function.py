"""A retrofitted network computes what the plain one does, has its gradients, and learns beyond it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepdelta
from deepdelta import UserError, recording, retrofit, retrofitted, undo_retrofit
from deepdelta.nn import rewriting
from deepdelta.ops.step import fused_step
from retrofit_models import FAMILIES, IDS, encoder, gpt2, llama, made, open_gates, output, residuals

pytestmark = pytest.mark.usefixtures("unchecked_file")
NAMES = list(FAMILIES)


# Equality


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_the_same(name, channels, training):
    family = FAMILIES[name]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        plain = made(name).to(dtype).train(training)
        model = copy.deepcopy(plain)
        assert retrofit(model, channels, seed=0) is model
        assert len(residuals(model)) == family.residuals
        with torch.no_grad():
            difference = output(model, family.x) - output(plain, family.x)
        assert difference.abs().max() <= tolerance
        assert output(plain, family.x).abs().max() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_those_of_the_plain_network(name):
    plain = made(name).double()
    model = retrofit(copy.deepcopy(plain), 4, seed=0)
    for network in (plain, model):
        output(network, FAMILIES[name].x).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients.pop(key), parameter.grad, rtol=1e-9, atol=1e-9, msg=key)
    # Behind a = 0 and W = 0: the gates; in a ResNet also the norm that only they and W see, and what they read after
    # a shortcut map.
    closed = {key for key in gradients if "erase_gate.outer" in key}
    assert len(closed) == 2 * FAMILIES[name].residuals
    closed |= {key for key in gradients if key.endswith("convolutions.norm.weight")}
    for key in (key.partition(".before.") for key in gradients if ".before." in key):
        closed.add(f"{key[0]}.convolutions.compression.weight")
    assert {key for key, gradient in gradients.items() if not gradient.any()} == closed


def test_half_precision_rounds_as_the_plain_network_does():
    plain = made("llama").bfloat16()
    model = retrofit(copy.deepcopy(plain), 1)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert output(model, IDS).equal(output(plain, IDS))


@pytest.mark.parametrize("name", ["llama", "pre-norm", "post-norm", "basic"])
def test_the_fused_backend_and_the_memory_plans_compute_the_same(name):
    pytest.importorskip("numba")
    model = retrofit(made(name).double(), 4, seed=0)
    open_gates(model)
    x = FAMILIES[name].x
    expected, gradients = value_and_gradients(model, x)
    deepdelta.use_memory(model, "replay", every=2)
    torch.testing.assert_close(value_and_gradients(model, x), (expected, gradients), rtol=1e-9, atol=1e-9)
    deepdelta.use_backend(model, "fused")
    torch.testing.assert_close(value_and_gradients(model, x), (expected, gradients), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("name", "channels"), [("llama", 4), ("llama", 1), ("pre-norm", 4), ("post-norm", 4)])
def test_a_residual_opens_the_next_one_of_its_block_in_its_own_pass(name, channels, monkeypatch):
    """Not at V = 1, where a fused norm would round otherwise than the network's, and not across a norm after the
    addition."""
    made_with = []

    def noting(*args, opens, **kwargs):
        made_with.append((opens, args[6] is not None))
        return fused_step(*args, opens=opens, **kwargs)

    monkeypatch.setattr(rewriting, "fused_step", noting)
    model = retrofit(made(name), channels)
    deepdelta.use_backend(model, "fused")
    output(model, FAMILIES[name].x)
    layers = len(made_with) // 2
    norm_too = name == "llama"  # a LayerNorm is called
    first = (True, norm_too) if channels == 4 and name != "post-norm" else (False, False)
    assert layers > 0
    assert made_with == [first, (False, False)] * layers


def value_and_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    result = output(model, x)
    return result.detach(), list(torch.autograd.grad(result.square().sum(), list(model.parameters())))


# Learning


def train(model: nn.Module, x: Tensor, steps: int, lr: float) -> list[float]:
    """Towards fixed random outputs."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    target = torch.randn(output(model, x).shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(steps):
        loss = (output(model, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bottleneck"])
def test_a_few_steps_open_the_gates_and_part_the_value_channels(name, channels):
    model, x = made(name), FAMILIES[name].x
    before = output(model, x).detach()
    retrofit(model, channels, seed=0, trainable="residual")
    plain = {key: parameter.clone() for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(plain) + len(model._deepdelta_retrofit.keys) == len(list(model.parameters()))
    losses = train(model, x, 1, lr=1e-3)
    (output(model, x).square().sum()).backward()
    assert all(parameter.grad.ne(0).any() for parameter in model.parameters() if parameter.requires_grad)
    losses += train(model, x, 5, lr=3e-3)
    assert losses[-1] < losses[0]
    assert (output(model, x) - before).abs().max() > 1e-3
    assert all(parameter.equal(plain[key]) for key, parameter in model.named_parameters() if key in plain)
    seen: dict[str, Any] = {}
    with recording(model, seen.__setitem__), torch.no_grad():
        output(model, x)
    assert seen.keys() == residuals(model).keys()
    for record in seen.values():
        assert record.erase.abs().max() > 1e-4
        if channels > 1:
            assert record.erase.shape[-1] == channels
            assert (record.erase.std(-1) / record.erase.abs().mean(-1)).max() > 1e-3
    assert max(record.erase.abs().mean() for record in seen.values()) > 3e-3
    if channels > 1:
        assert record.read.std(-1).max() > 1e-4


@pytest.mark.parametrize("name", ["post-norm", "pre-norm", "layer"])
def test_torch_s_fused_encoder_layer_is_never_taken(name):
    """In evaluation mode without gradients torch would add the residuals itself."""
    model, x = made(name), FAMILIES[name].x
    with torch.no_grad():
        plain = model(x)
        retrofit(model, 4, seed=0)
        open_gates(model)
        fast = model(x)
    assert (fast - plain).abs().max() > 1e-3
    torch.testing.assert_close(fast, model(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(fast, model.train()(x), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks_of_an_encoder(batch_first, norm_first):
    torch.manual_seed(0)
    model = encoder(norm_first, batch_first=batch_first).eval()
    x = FAMILIES["post-norm"].x if batch_first else FAMILIES["post-norm"].x.transpose(0, 1)
    padding = torch.arange(7) >= torch.tensor([7, 5, 3])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(7).isinf()
    real = ~padding if batch_first else ~padding.T
    for masks in ({"src_key_padding_mask": padding}, {"src_key_padding_mask": padding, "mask": causal}):
        with torch.no_grad():
            expected = model(x, **masks)[real]
            actual = retrofit(model, 4)(x, **masks)[real]
            undo_retrofit(model)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert model.use_nested_tensor == (batch_first and not norm_first)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused():
    layer = retrofit(made("layer"))
    with pytest.raises(UserError, match="takes padded tensors, got a nested one"), torch.no_grad():
        layer(torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)]))


def test_cross_attention_of_gpt2():
    torch.manual_seed(0)
    plain = gpt2(add_cross_attention=True).eval()
    model = retrofit(copy.deepcopy(plain))
    assert len(residuals(model)) == 9
    others = torch.randn(3, 4, 32)
    with torch.no_grad():
        expected = plain(IDS, encoder_hidden_states=others).logits
        actual = model(IDS, encoder_hidden_states=others).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="made with add_cross_attention=True"):
        retrofit(made("gpt2"))(IDS, encoder_hidden_states=others)


@torch.no_grad()
def test_a_gpt_decodes_with_a_cache():
    model = retrofit(made("gpt").double(), 4, seed=0)
    open_gates(model)
    expected, cache = model(IDS).logits, deepdelta.decoding.DecodingCache(model, batch=3)
    torch.testing.assert_close(cache.decode(IDS[:, :4]), expected[:, :4])
    for token in range(4, IDS.shape[1]):
        torch.testing.assert_close(cache.decode(IDS[:, token : token + 1])[:, 0], expected[:, token])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_added_takes_the_model_s_mode(name, training):
    model = retrofit(made(name).train(training))
    assert {part.training for part in model.modules()} == {training}


def test_running_statistics_of_a_resnet_in_training():
    """The shortcut's batch norm sees V equal copies: the same mean and, but for Bessel's correction, variance."""
    plain = made("basic").train()
    model = retrofit(copy.deepcopy(plain), 4)
    x = FAMILIES["basic"].x
    for network in (plain, model):
        network(x)
    expected = dict(plain.named_buffers())
    for name, buffer in model.named_buffers():
        tolerance = 0.1 if name.endswith("downsample.1.running_var") else 1e-5
        torch.testing.assert_close(buffer, expected[name], rtol=tolerance, atol=1e-5, msg=name)


# Taking it back


@pytest.mark.parametrize("name", NAMES)
def test_undo_gives_the_same_model_back(name):
    model, x = made(name), FAMILIES[name].x
    kinds = [(key, type(part)) for key, part in model.named_modules()]
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    before, attributes = output(model, x), {key: set(vars(part)) for key, part in model.named_modules()}
    retrofit(model, 4, trainable="residual")
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()} - {0}) >= len(keys) - 1  # GPT-2 ties its head
    assert [key for key in state if key in keys] == keys
    assert undo_retrofit(model) is model
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert [(key, type(part)) for key, part in model.named_modules()] == kinds
    assert {key: set(vars(part)) for key, part in model.named_modules()} == attributes
    assert output(model, x).equal(before)
    retrofit(model, 2)  # and again


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_shares_nothing_and_can_be_undone_alone(name):
    model, x = retrofit(made(name), 2, seed=0), FAMILIES[name].x
    open_gates(model)
    expected, copied = output(model, x), copy.deepcopy(model)
    assert output(copied, x).equal(expected)
    undo_retrofit(copied)
    assert not output(copied, x).equal(expected)
    assert output(model, x).equal(expected)
    assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in model.parameters()})


def test_every_key_stands_once_and_the_plain_ones_are_the_plain_model_s():
    plain = llama()
    keys = list(plain.state_dict())
    model = retrofit(plain, 4)
    state = model.state_dict()
    new = [key for key in state if key not in keys]
    own = [
        "compression.weight", "erase_gate.opening", "erase_gate.outer.bias", "erase_gate.outer.weight",
        "write.map.weight",
    ]  # fmt: skip
    expected = [
        f"model.layers.{i}.delta.{part}.{one}" for i in range(3) for part in ("attention", "mlp") for one in own
    ]
    assert sorted(new) == sorted([*expected, "model.layers.2.delta.stream.readout.weight"])
    storages = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(storages)) == len(storages)


# The report


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_report_counts_what_was_added(name, channels):
    model = made(name)
    plain = sum(parameter.numel() for parameter in model.parameters())
    report = retrofitted(retrofit(model, channels, trainable="residual"))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (report.plain, report.parameters_added, report.trained) == (plain, total - plain, total - plain)
    holders = FAMILIES[name].blocks if name != "gpt" else FAMILIES[name].residuals + 1
    assert len(report.added) == holders
    assert report.config.value_channels == channels


def test_the_report_by_hand():
    """Per residual at V = 1, d = 32: a gate's 32 + 1, and what opens it. At V = 4 also 4 d of W and of C, 4 gates."""
    report = retrofitted(retrofit(made("llama"), 1))
    assert dict(report.added) == {f"model.layers.{i}": 2 * 34 for i in range(3)}
    assert report.families == ("LlamaModel",)
    assert report.trained == report.plain + report.parameters_added
    report = retrofitted(retrofit(made("llama"), 4))
    each = 2 * (4 * 33 + 1 + 2 * 4 * 32)
    assert dict(report.added) == {f"model.layers.{i}": each + 128 * (i == 2) for i in range(3)}


def test_a_seed_decides_the_gates():
    def gates(seed: int | None) -> Tensor:
        return retrofit(made("llama", seed=5), 2, seed=seed).get_parameter(
            "model.layers.0.delta.mlp.erase_gate.outer.weight"
        )

    assert gates(1).equal(gates(1)) and not gates(1).equal(gates(2))
    report = retrofitted(retrofit(made("llama"), 2))
    assert isinstance(report.config.seed, int)

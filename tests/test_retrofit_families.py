"""Every family of transformers that has a table of its blocks: the same function, gradients, caches and states."""

import copy
import pickle

import pytest
import torch
from torch import nn

from deepdelta import UserError, load_retrofit, retrofit, retrofitted, save_retrofit, undo_retrofit
from deepdelta.retrofitting import Addition, Block, Branch, Stack, families, register
from deepdelta.retrofitting.describing import full_name
from retrofit_families import MODELS, called, made, output
from retrofit_models import IDS, open_gates, residuals

NAMES = list(MODELS)
NEVER_RANDOM = ("clip",)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*clean_up_tokenization_spaces.*"),
    pytest.mark.usefixtures("unchecked_file"),
]


@pytest.mark.compatible("retrofit of the families in the list: the same function", "transformers")
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_the_same(name):
    """To the last bit with V = 1; in training too, where the same numbers are dropped."""
    one, plain = MODELS[name], made(name)
    for channels in (1, 4):
        model = retrofit(copy.deepcopy(plain), channels, seed=0)
        assert len(residuals(model)) == one.residuals
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            networks = [network.to(dtype) for network in copy.deepcopy((plain, model))]
            for training in (False, True):
                expected, actual = (seeded(network.train(training), one.inputs) for network in networks)
                assert expected.isfinite().all() and expected.std() > 1e-3
                assert (actual - expected).abs().max() <= (0 if channels == 1 else tolerance)
            if name not in NEVER_RANDOM:
                assert not expected.equal(output(networks[0].eval(), one.inputs))


def seeded(model, inputs):
    torch.manual_seed(5)
    return output(model, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_the_plain_network_s_and_undo_gives_it_back(name):
    plain, inputs = made(name).double(), MODELS[name].inputs
    model = retrofit(copy.deepcopy(plain), 4, seed=0)
    for network in (plain, model):
        output(network, inputs).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients.pop(key), parameter.grad, rtol=1e-7, atol=1e-9, msg=key)
    openings = [gradient for key, gradient in gradients.items() if key.endswith("erase_gate.opening")]
    assert len(openings) == MODELS[name].residuals and all(gradient.any() for gradient in openings)
    expected = output(plain, inputs)
    open_gates(model)
    assert not torch.allclose(output(model, inputs), expected, atol=1e-3)
    assert output(undo_retrofit(model), inputs).equal(expected)
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if MODELS[name].generates])
def test_generation_and_a_cache(name):
    plain = made(name)
    model = retrofit(copy.deepcopy(plain), 4, seed=0)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = plain.generate(IDS[:, :5], **options)
    assert model.generate(IDS[:, :5], **options).equal(expected)
    open_gates(model)
    cached, whole = (model.generate(IDS[:, :5], **options, use_cache=cache) for cache in (True, False))
    assert cached.equal(whole)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_attentions(name):
    plain, inputs = made(name), MODELS[name].inputs
    wanted = {"output_hidden_states": True}
    if "resnet" not in name and name != "convnext":
        plain.set_attn_implementation("eager")
        wanted["output_attentions"] = True
    model = retrofit(copy.deepcopy(plain), 2, seed=0)
    expected, actual = called(plain, inputs, **wanted), called(model, inputs, **wanted)
    compared = compare(actual, expected)
    assert compared >= (4 if "output_attentions" in wanted or "net" in name else 2)


def compare(actual, expected) -> int:
    """How many tensors were compared."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        return 1
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        return sum(compare(actual[key], expected[key]) for key in expected)
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        return sum(compare(one, two) for one, two in zip(actual, expected, strict=True))
    return 0


def cut(model: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, model.get_submodule(path)[:1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("olmo2", "model.layers"), ("gpt-neox", "gpt_neox.layers"), ("opt", "model.decoder.layers"),
        ("opt post-norm", "model.decoder.layers"), ("bert", "bert.encoder.layer"), ("dinov2", "dinov2.encoder.layer"),
        ("clip", "vision_model.encoder.layers"), ("clip", "text_model.encoder.layers"), ("t5", "encoder.block"),
        ("t5", "decoder.block"), ("whisper", "model.encoder.layers"), ("whisper", "model.decoder.layers"),
        ("resnet", "resnet.encoder.stages.0.layers"), ("convnext", "convnext.encoder.stages.0.layers"),
    ],
)  # fmt: skip
def test_fewer_blocks_compute_what_fewer_plain_ones_do(name, path):
    plain, inputs = made(name), MODELS[name].inputs
    model = retrofit(copy.deepcopy(plain), 3, seed=0)
    for network in (plain, model):
        cut(network, path)
    torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=0, atol=1e-5)


def test_layers_that_are_dropped_in_training():
    plain = made("whisper", encoder_layerdrop=0.5, decoder_layerdrop=0.5).train()
    model = retrofit(copy.deepcopy(plain), 3, seed=0)
    for seed in range(4):
        results = []
        for network in (plain, model):
            torch.manual_seed(seed)
            results.append(output(network, MODELS["whisper"].inputs))
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_a_setting_without_a_description_is_refused_and_the_model_stays_plain():
    model = made("bert", chunk_size_feed_forward=2)
    keys = list(model.state_dict())
    with pytest.raises(UserError, match=r"a BertLayer with chunk_size_feed_forward=0, got one with .*=2; set that"):
        retrofit(model)
    assert list(model.state_dict()) == keys


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x):
        return x + self.scale * self.linear(x)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dim, self.parts = 8, nn.ModuleList(Half() for _ in range(3))

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def described(*steps: str) -> Stack:
    block = Block((Addition("linear", (Branch(steps),)),))
    return Stack("parts.*", {Half: block}, width="dim", norm="rms")


def test_a_network_of_one_s_own(tmp_path):
    torch.manual_seed(0)
    plain, x = Halves(), torch.randn(2, 5, 8)
    with pytest.raises(UserError, match="no residual structure in Halves"):
        retrofit(copy.deepcopy(plain))
    try:
        register(Halves, described("linear", "scale"))
        register(Halves, described("linear", "scale"))
        with pytest.raises(UserError, match="Halves has been registered already, with another description"):
            register(Halves, described("linear"))
        model = retrofit(copy.deepcopy(plain), 4, seed=0)
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-6)
        assert retrofit(copy.deepcopy(plain), 1)(x).equal(plain(x))
        open_gates(model)
        save_retrofit(model, tmp_path)
        assert load_retrofit(copy.deepcopy(plain), tmp_path)(x).equal(model(x))
        assert pickle.loads(pickle.dumps(model))(x).equal(model(x))
        model.parts = model.parts[:2]
        assert model(x).shape == x.shape
        families.STACKS[full_name(Halves)] = described("linear", "size")
        with pytest.raises(UserError, match="the description of Half names 'size', and Half has no 'size'"):
            retrofit(plain)
    finally:
        families.STACKS.pop(full_name(Halves), None)


def test_what_is_no_module_cannot_be_registered(unchecked):
    with pytest.raises(UserError, match=r"takes a class of torch.nn.Module, got <class 'int'>"):
        families.register(int, described("linear"))


def test_two_towers_are_two_stacks():
    report = retrofitted(retrofit(made("clip"), 2))
    assert report.families == ("CLIPTextModel", "CLIPVisionModel")
    assert len(report.added) == 5

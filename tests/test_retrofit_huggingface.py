"""What the models of transformers can do besides a forward pass goes on working: caches, generation, checkpointing."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from deepdelta import UserError, retrofit, undo_retrofit
from retrofit_models import FAMILIES, IDS, llama, made, open_gates, output

pytestmark = pytest.mark.usefixtures("unchecked_file")

TEXT = ["llama", "qwen3", "gpt2"]
NAMES = [*TEXT, "vit"]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation_gives_the_plain_model_s_tokens(name, channels, options):
    plain = made(name)
    model = retrofit(copy.deepcopy(plain), channels)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    expected, actual = (network.generate(IDS[:, :5], **options) for network in (plain, model))
    assert actual.shape[1] == 13 and actual.equal(expected)


@torch.no_grad()
@pytest.mark.parametrize("name", TEXT)
def test_a_cache_gives_the_logits_of_the_whole_text(name):
    """Once the gates are open, when the plain model is no measure any more."""
    model = retrofit(made(name), 4)
    open_gates(model)
    whole = model(IDS, use_cache=False).logits
    first = model(IDS[:, :6], use_cache=True)
    torch.testing.assert_close(first.logits, whole[:, :6], rtol=1e-4, atol=1e-5)
    cache = first["cache"]
    for token in range(6, IDS.shape[1]):
        step = model(IDS[:, token : token + 1], cache=cache, use_cache=True)
        torch.testing.assert_close(step.logits[:, 0], whole[:, token], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", TEXT)
def test_padding_on_the_left(name):
    plain = made(name)
    model = retrofit(copy.deepcopy(plain), 4)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    expected, actual = (network(IDS, attention_mask=mask).logits for network in (plain, model))
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    model = retrofit(made(name).double(), 3, seed=0)
    open_gates(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    counted = []
    handle = next(part for key, part in model.named_modules() if key.endswith("1.delta.mlp.erase_gate"))
    handle.register_forward_hook(lambda *_: counted.append(1))
    expected = gradients(model, name)
    assert len(counted) == 1
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients(model, name)
    assert len(counted) == 3  # once in the forward pass, once again in the backward pass
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def gradients(model: nn.Module, name: str) -> list[torch.Tensor]:
    model.zero_grad()
    output(model, FAMILIES[name].x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_attentions_are_the_plain_model_s(name, channels):
    plain, x = made(name), FAMILIES[name].x
    plain.set_attn_implementation("eager")
    model = retrofit(copy.deepcopy(plain), channels)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected = plain(x, **wanted)
    for actual in (model(x, **wanted), model(x, **wanted)):  # the second call finds its hooks installed
        for key in ("hidden_states", "attentions"):
            assert len(actual[key]) == len(expected[key])
            for one, two in zip(actual[key], expected[key], strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    inner = model.base_model(x, return_dict=False, **wanted)
    assert any(isinstance(part, tuple) and len(part) == 4 for part in inner)
    for one, two in zip(next(part for part in inner if isinstance(part, tuple) and len(part) == 4),
                        expected.hidden_states, strict=True):  # fmt: skip
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    undo_retrofit(model)
    assert all(
        one.equal(two) for one, two in zip(model(x, **wanted).hidden_states, expected.hidden_states, strict=True)
    )


@torch.no_grad()
def test_hidden_states_are_what_the_next_block_reads():
    model = retrofit(made("llama"), 4, seed=0)
    open_gates(model)
    seen = []
    model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], seen[0], rtol=0, atol=1e-6)
    assert states[1].shape == (3, 11, 32)
    some = model(IDS, output_hidden_states=[1]).hidden_states
    assert some[0] is None and some[1].equal(states[1])


def test_a_base_model_and_a_classifier():
    from transformers import LlamaForSequenceClassification

    for build in (lambda: llama().model, lambda: LlamaForSequenceClassification(llama().config)):
        torch.manual_seed(0)
        plain = build().eval()
        model = retrofit(copy.deepcopy(plain), 4)
        with torch.no_grad():
            for one, two in zip(plain(IDS).to_tuple(), model(IDS).to_tuple(), strict=True):
                if isinstance(one, torch.Tensor):
                    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_another_depth_than_the_config_says_is_refused():
    model = llama()
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    with pytest.raises(UserError, match=r"as many blocks as its config says, 3, got 4"):
        retrofit(model)


def test_an_older_release_is_refused(monkeypatch):
    model = llama()  # before: making one may import the library anew
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.56.2")
    with pytest.raises(UserError, match=r"transformers 4\.57, or 5\.24 and newer, got 4\.56\.2; install one of these"):
        retrofit(model)


def test_the_libraries_are_not_imported():
    code = (
        "import sys, torch, deepdelta; deepdelta.retrofit(torch.nn.TransformerEncoderLayer(8, 2)); "
        "print([name for name in ('transformers', 'torchvision') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_environment_of_the_tests_imports_transformers_as_a_user_does():
    code = "from transformers import LlamaForCausalLM, ViTModel; print(LlamaForCausalLM.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "LlamaForCausalLM\n", done.stderr

"""A retrofit in the hands of other libraries: pickle, from_pretrained, PEFT, accelerate, early exits."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.utils import compute_module_sizes, infer_auto_device_map
from accelerate.utils.dataclasses import get_module_class_from_name
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file
from torch import nn

from deepdelta import DeltaStream, UserError, load_retrofit, retrofit, retrofitted, save_retrofit, undo_retrofit
from deepdelta.retrofitting.blocks import delta_class
from retrofit_models import FAMILIES, IDS, gpt2, llama, made, open_gates, output, transformers

CPU = torch.device("cpu")
BY_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")


def opened(name: str, **options: Any) -> nn.Module:
    model = retrofit(made(name), 4, seed=0, **options)
    open_gates(model)
    return model


# pickle


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bottleneck"])
def test_a_retrofit_is_pickled(name):
    model, x = opened(name, trainable="residual"), FAMILIES[name].x
    expected, buffer = output(model, x), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    delta_class.cache_clear()  # as in a process that has made none of the classes yet
    again = torch.load(buffer, weights_only=False)
    assert output(again, x).equal(expected)
    assert dict(retrofitted(again).added) == dict(retrofitted(model).added)
    assert output(undo_retrofit(again), x).equal(output(made(name), x))
    assert output(model, x).equal(expected)


def test_a_block_alone_and_a_config_are_copied_and_pickled():
    model = opened("llama")
    for made_again in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        block, config = made_again(model.model.layers[0]), made_again(model.config)
        assert type(block) is type(model.model.layers[0])
        assert block.state_dict().keys() == model.model.layers[0].state_dict().keys()
        assert config.to_dict() == model.config.to_dict() and config.num_hidden_layers == 3


# save_pretrained


def test_a_part_that_was_retrofitted_marks_the_whole_and_the_last_to_go_unmarks(tmp_path):
    one = llama()
    two = type(one)(one.config)
    for model in (one, two):
        retrofit(model.model)
    undo_retrofit(one.model)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(StrictDataclassFieldValidationError, match=r"a retrofit by deepdelta, no plain model: import"):
        type(one).from_pretrained(tmp_path / "two")
    undo_retrofit(two.model)
    assert vars(two.config).keys() == vars(llama().config).keys() and type(two.config) is type(llama().config)
    one.save_pretrained(tmp_path / "one")
    type(one).from_pretrained(tmp_path / "one")


# PEFT


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    targets = ["c_attn"] if "GPT2" in type(model).__name__ else ["q_proj"]
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, fan_in_fan_out="c_attn" in targets, **options)
    )


def trained(model: nn.Module) -> nn.Module:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.compatible("a PEFT adapter with the deltas of a retrofit", "peft", "transformers")
@BY_PEFT
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_holds_the_deltas_as_modules_to_save(name, tmp_path):
    plain = made(name)
    model = retrofit(copy.deepcopy(plain), 4, seed=0)
    expected, new = output(model, IDS), retrofitted(model).parameters_added
    model = trained(adapted(model, modules_to_save=["delta"]))
    assert (output(model, IDS) - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert output(model, IDS).equal(expected)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for key, tensor in saved.items() if ".delta." in key) == new
    again = peft.PeftModel.from_pretrained(retrofit(copy.deepcopy(plain), 4, seed=0), tmp_path / "adapter").eval()
    assert output(again, IDS).equal(output(model, IDS))
    states = model(IDS, output_hidden_states=True).hidden_states
    assert [state.ndim for state in states] == [3] * 4
    with pytest.raises(UserError, match=r"'s delta as retrofit left it, and there is peft\..*ModulesToSaveWrapper"):
        undo_retrofit(model.get_base_model())


def injected(model: nn.Module) -> nn.Module:
    """Without a model of PEFT around it."""
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


def freeze_deltas(model: nn.Module, frozen: bool) -> None:
    for name, parameter in model.named_parameters():
        if ".delta." in name:
            parameter.requires_grad_(not frozen)


@BY_PEFT
@pytest.mark.parametrize("adapt", [adapted, injected])
def test_deltas_that_an_adapter_would_lose_are_refused_and_can_be_kept(adapt, tmp_path):
    model = adapt(retrofit(made("llama"), 4, seed=0))
    freeze_deltas(model, False)
    trained(model)
    with pytest.raises(UserError, match=r"'model.layers.0.delta.* and 30 more tensors .*modules_to_save=\['delta'\]"):
        model.save_pretrained(tmp_path / "adapter")
    freeze_deltas(model, True)
    with pytest.warns(UserWarning, match=r"added \(31 tensors\) is frozen beside this adapter.*=\['delta'\]"):
        model.state_dict()
    model.state_dict()
    save_retrofit(model, tmp_path / "retrofit")
    again = load_retrofit(made("llama", seed=5), tmp_path / "retrofit")
    lora = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    again = adapt(again).eval()
    again.load_state_dict(lora, strict=False)
    assert len(lora) == 6 and output(again, IDS).equal(output(model, IDS))


@BY_PEFT
def test_prompt_tuning_would_lose_them_too(tmp_path):
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(retrofit(made("llama")), config)
    with pytest.warns(UserWarning, match="is frozen beside this adapter"):
        model.save_pretrained(tmp_path)
    model.get_parameter("base_model.model.layers.0.delta.mlp.erase_gate.opening").requires_grad_(True)
    with pytest.raises(UserError, match="and 0 more tensors of the retrofit"):
        model.save_pretrained(tmp_path)


# accelerate


@pytest.mark.parametrize(
    ("name", "kind", "stack"), [("llama", "LlamaDecoderLayer", "model.layers"), ("gpt2", "GPT2Block", "transformer.h")]
)
def test_blocks_keep_the_name_that_tools_look_for(name, kind, stack):
    model = opened(name)
    assert kind in model._no_split_modules
    assert get_module_class_from_name(model, kind) is type(model.get_submodule(f"{stack}.0"))
    # Where a block and a half are too much for one place, the whole second block goes to the other.
    sizes = compute_module_sizes(model)
    budget = {"cpu": sizes[""] - 3 * sizes[f"{stack}.2"] // 2, "disk": sizes[""]}

    def split(kinds: list[str]) -> list[str]:
        places = infer_auto_device_map(model, budget, no_split_module_classes=kinds)
        assert set(places.values()) == {"cpu", "disk"}
        return [key for key in places if key.startswith(f"{stack}.") and key.count(".") > stack.count(".") + 1]

    assert split([]) and not split(list(model._no_split_modules))


@torch.no_grad()
@pytest.mark.parametrize(
    "offload",
    [
        lambda model, folder: accelerate.cpu_offload(model, CPU),
        lambda model, folder: accelerate.disk_offload(model, folder, CPU),
    ],
    ids=["cpu", "disk"],
)
@pytest.mark.compatible("an offloaded retrofit", "accelerate")
def test_an_offloaded_retrofit_computes_the_same(offload, tmp_path):
    model = opened("llama")
    expected = output(model, IDS)
    offload(model, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    # Maps whose weights come and go are called one by one, and so round otherwise than as one.
    torch.testing.assert_close(output(model, IDS), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"must hold its values, and 'model.embed_tokens.weight' is on the device meta"):
        save_retrofit(model, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    torch.testing.assert_close(output(undo_retrofit(model), IDS), output(made("llama"), IDS))


@torch.no_grad()
def test_undo_under_a_replaced_forward_is_refused_and_changes_nothing():
    model = opened("llama")
    expected = output(model, IDS)
    accelerate.hooks.add_hook_to_module(model.model.layers[1], accelerate.hooks.ModelHook())
    with pytest.raises(UserError, match=r"LlamaDecoderLayer has a forward set on the object itself.*take them off"):
        undo_retrofit(model)
    assert output(model, IDS).equal(expected) and retrofitted(model).families == ("LlamaModel",)
    accelerate.hooks.remove_hook_from_module(model.model.layers[1])
    assert output(undo_retrofit(model), IDS).equal(output(made("llama"), IDS))


def test_a_model_that_is_offloaded_already_is_refused():
    model = llama()
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(UserError, match=r"weights of LlamaDecoderLayer are offloaded.*retrofit before"):
        retrofit(model)


# Fewer blocks than were converted


def fewer_by_config(model: nn.Module) -> None:
    model.config.num_hidden_layers = 1


def cut(part: slice) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        name = "h" if hasattr(model.base_model, "h") else "layers"
        setattr(model.base_model, name, getattr(model.base_model, name)[part])

    return change


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", fewer_by_config),
        ("qwen3", fewer_by_config),
        *(
            (name, cut(part))
            for name in ("llama", "gpt2", "vit")
            for part in (slice(2), slice(1, None), slice(0, 3, 2))
        ),
    ],
)
def test_fewer_blocks_compute_what_fewer_plain_ones_do(name, change, channels):
    plain, x = made(name), FAMILIES[name].x
    model = retrofit(copy.deepcopy(plain), channels)
    for one in (plain, model):
        change(one)
    options = {"output_hidden_states": True} | ({} if name == "vit" else {"use_cache": False})
    expected, actual = plain(x, **options), model(x, **options)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)


def test_an_early_exit_drafts_for_the_whole():
    model = opened("llama")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(IDS[:1, :5], **options)
    assert model.generate(IDS[:1, :5], assistant_early_exit=2, **options).equal(expected)


def without(name: str, change: Callable[[nn.Module], Any], channels: int = 4) -> Callable[[], Any]:
    def run() -> Any:
        model = retrofit(made(name), channels)
        change(model)
        return output(model, FAMILIES[name].x)

    return run


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            without("post-norm", lambda model: setattr(model, "layers", model.layers[:2])),
            "its first layer and its last",
        ),
        # As many value channels as tokens: the plain input has the shape of a state.
        (
            without("pre-norm", lambda model: setattr(model, "layers", model.layers[1:]), 7),
            "its first layer and its last",
        ),
        (without("basic", lambda model: setattr(model, "layer4", nn.Identity())), "must run its last block"),
    ],
)
def test_a_stack_without_its_end_is_refused(run, message):
    with pytest.raises(UserError, match=message):
        run()


# Whole layers of transformers add their input


def t5_part(path: str) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5Model(transformers.T5Config(vocab_size=10, **sizes)).get_submodule(path)


def conv_layer() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)
    return transformers.ConvNextModel(config).encoder.stages[0].layers[0]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: llama().model.layers[0], "LlamaDecoderLayer adds its input itself.*wrap its branches"),
        (lambda: gpt2().transformer.h[0], "GPT2Block adds its input itself"),
        (lambda: made("vit").vit.layers[0], "ViTLayer adds its input itself"),
        (lambda: retrofit(llama()).model.layers[0], "LlamaDecoderLayer adds its input itself"),
        (lambda: t5_part("encoder.block.0"), "T5Block adds its input itself"),
        (lambda: t5_part("encoder.block.0.layer.0"), "T5LayerSelfAttention adds .*the attention or the feed-forward"),
        (lambda: t5_part("decoder.block.0.layer.2"), "T5LayerFF adds its input itself"),
        (conv_layer, "ConvNextLayer adds its input itself"),
    ],
)
def test_wrap_refuses_whole_layers(part, message):
    with pytest.raises(UserError, match=message):
        DeltaStream(32).wrap(part())


def test_wrap_takes_what_is_inside_of_them():
    layer = llama().model.layers[0]
    for branch in (
        layer.self_attn,
        layer.mlp,
        gpt2().transformer.h[0].attn,
        t5_part("encoder.block.0.layer.1.DenseReluDense"),
    ):
        assert DeltaStream(32).wrap(branch).branch is branch

"""What an import or export refuses, and that the message names it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, UserError
from deepdelta.interop import load_published, to_published
from deepdelta.interop.published import ONLY_AT_DEFAULT
from test_oracle import vector


def refused(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    with pytest.raises(UserError) as caught:
        load_published(config, tensors)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("ddl_v_sigmoid_scal", "ddl_v_sigmoid_scale"),
        ("ddl_k_epsilon", "ddl_k_eps"),
        ("num_hidden_layer", "num_hidden_layers"),
        ("using_group_norm", "using_groupnorm"),
    ],
)
def test_unknown_keys_name_the_nearest(key, meant):
    given = vector("cc")
    assert refused(given.config | {key: 1}, given.parameters) == (
        f"unknown configuration key '{key}'; did you mean '{meant}'?"
    )


NOT_DEFAULT = {"q_activation": "silu", "k_activation": "relu", "v_activation": "silu", "dropout": 0.1}


@pytest.mark.parametrize("key", ONLY_AT_DEFAULT)
def test_keys_without_counterpart_are_accepted_at_their_default_alone(key):
    given = vector("cc")
    default = ONLY_AT_DEFAULT[key]
    value = NOT_DEFAULT.get(key, not default)
    message = refused(given.config | {key: value}, given.parameters)
    assert message == f"{key}={value!r} is not supported; only its default {default!r} is."
    load_published(given.config | {key: default}, given.parameters)


def test_the_refused_keys_are_those_of_the_specification():
    named = {"using_groupnorm", "use_output_gate", "use_k_shift", "use_v_shift", "mup"}
    assert ONLY_AT_DEFAULT.keys() >= named | {"q_activation", "k_activation", "v_activation"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ddl_v_sigmoid", "no"),
        ("ddl_v_sigmoid", 1),
        ("ddl_beta_init", "high"),
        ("ddl_beta_single_linear", None),
        ("ddl_value_channels", "4"),
        ("ddl_value_channels", 4.5),
        ("ddl_state_shortconv_kernel_size", [4]),
        ("ddl_k_eps", True),
        ("input_embed_shortconv_kernel_size", "4"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_key(key, value):
    given = vector("cc")
    message = refused(given.config | {key: value}, given.parameters)
    assert f"published configuration: {key}: " in message and repr(value) in message


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cc", {"ddl_state_shortconv_kernel_size": 0}, "compression_kernel must lie in [1, 4096]"),
        ("cc", {"ddl_state_shortconv_kernel_size": 5}, "compression_kernel > value_channels"),
        ("tc", {"ddl_state_shortconv_kernel_size": 0}, "compression_kernel must lie in [1, 4096]"),
        ("cc", {"ddl_value_channels": 1}, "value_channels=1 with compression='channel_conv'"),
        ("tc", {"ddl_value_channels": 1}, "have ddl_value_channels of at least 2, got 1"),
        ("cc-ec", {"input_embed_shortconv_kernel_size": 0}, "expansion_kernel must lie in [1, 4096]"),
        ("cc", {"ddl_k_eps": -1.0}, "direction_eps must lie in"),
        ("cc", {"rope_ratio": 1.5}, "rope_fraction must lie in [0, 1], got 1.5"),
        ("cc", {"num_hidden_layers": 0}, "layers must be at least 1, got 0"),
    ],
)
def test_values_out_of_range(name, change, message):
    given = vector(name)
    assert message in refused(given.config | change, given.parameters)


@pytest.mark.parametrize("name", ["scalar", "tc-ec", "cc-ec-two-layer-gate"])
def test_every_missing_tensor_is_named(name):
    given = vector(name)
    for key in given.parameters:
        less = {other: tensor for other, tensor in given.parameters.items() if other != key}
        if key == "input_embed.conv.weight":  # without it, this is the variant that repeats the embedding
            assert load_published(given.config, less).config.residual.expansion == "repeat"
        else:
            assert refused(given.config, less) == f"the published tensors {key} are missing."


def test_all_missing_tensors_are_named_at_once():
    given = vector("cc")
    less = dict(given.parameters)
    del less["ln_f.weight"], less["transformer.h.1.ddl_mlp.beta.bias"]
    assert refused(given.config, less) == (
        "the published tensors ln_f.weight, transformer.h.1.ddl_mlp.beta.bias are missing."
    )
    assert "transformer.wte.weight" in refused(given.config, {})


@pytest.mark.parametrize("name", ["scalar", "tc-ec", "cc-ec-two-layer-gate"])
def test_every_misshapen_tensor_is_named(name):
    given = vector(name)
    for number, (key, tensor) in enumerate(given.parameters.items()):
        wrong = (tensor[None], torch.cat([tensor, tensor]), tensor[:0])[number % 3]
        assert refused(given.config, given.parameters | {key: wrong}) == (
            f"{key} must be a floating-point tensor of shape {tuple(tensor.shape)}, got torch.float32 of shape "
            f"{tuple(wrong.shape)}."
        )


def test_tensors_of_integers_are_refused():
    given = vector("cc")
    for kind in (torch.int64, torch.bool, torch.complex64):
        wrong = given.parameters["ln_f.weight"].to(kind)
        message = refused(given.config, given.parameters | {"ln_f.weight": wrong})
        assert message.startswith("ln_f.weight must be a floating-point tensor") and str(kind) in message


def test_half_precision_is_widened():
    given = vector("cc")
    narrow = {name: tensor.bfloat16() for name, tensor in given.parameters.items()}
    back = to_published(load_published(given.config, narrow))
    assert all(back[name].equal(tensor.float()) for name, tensor in narrow.items())


def test_unknown_tensors_name_the_nearest():
    given = vector("cc")
    extra = {"transformer.h.1.ln_2.wait": torch.zeros(3)}
    assert refused(given.config, given.parameters | extra) == (
        "unknown tensor 'transformer.h.1.ln_2.wait'; did you mean 'transformer.h.1.ln_2.weight'?"
    )


@pytest.mark.parametrize(
    ("key", "like"),
    [
        ("transformer.h.9.ddl_attn.v_proj.weight", "transformer.h.0.ddl_attn.v_proj.weight"),
        ("transformer.h.0.ddl_up.v_proj.weight", "transformer.h.0.ddl_attn.v_proj.weight"),
    ],
)
def test_what_a_constant_target_does_not_use_must_still_belong_to_the_model(key, like):
    given = vector("aside-constant")
    assert f"unknown tensor '{key}'" in refused(given.config, given.parameters | {key: given.parameters[like]})
    message = refused(given.config, given.parameters | {like: torch.zeros(2, 3)})
    assert message.startswith(f"{like} must be a floating-point tensor of shape (4, 16)")


def test_the_tied_head():
    given = vector("cc")
    embedding = given.parameters["transformer.wte.weight"]
    beside = {"lm_head.weight": embedding.clone()}
    assert to_published(load_published(given.config, given.parameters | beside)).keys() == given.parameters.keys()
    for untied in (embedding + 1e-6, embedding[:5], embedding.half()):
        assert refused(given.config, given.parameters | {"lm_head.weight": untied}) == (
            "lm_head.weight must equal transformer.wte.weight: the published head is tied to the embedding."
        )
    less = {name: tensor for name, tensor in given.parameters.items() if name != "transformer.wte.weight"}
    assert refused(given.config, less | beside) == "the published tensors transformer.wte.weight are missing."


def model(**residual: Any) -> GPT:
    preset = "code-scalar" if residual.get("value_channels") == 1 else "code-cc"
    settings = dataclasses.replace(PRESETS[preset], **residual)
    return GPT(GPTConfig(vocab_size=11, context=8, layers=1, heads=2, dim=8, residual=settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rule", {"rule": "additive"}),
        ("rule", {"rule": "write_only"}),
        ("rule", {"rule": "channels"}),
        ("rank", {"rank": 2}),
        ("direction", {"direction": "pooled", "target": "branch"}),
        ("direction_norm", {"direction_norm": "operator"}),
        ("target", {"target": "linear"}),
        ("target", {"target": "magnitude"}),
        ("target", {"target": "affine"}),
        ("gate", {"gate": "constant"}),
        ("gate_range", {"gate_range": 1, "gate_init": 0.5}),
        ("gate_per_channel", {"gate_per_channel": True}),
        ("gate_hidden_bias", {"gate": "two_layer", "gate_hidden_bias": True}),
        ("compression", {"compression": "channel", "compression_init": "identity"}),
        ("compression_causal", {"compression_causal": True}),
        ("compression_sharing", {"compression_sharing": "sublayer"}),
        ("norm", {"norm": "none"}),
        ("norm_eps", {"norm_eps": 1e-3}),
    ],
)
def test_exporting_other_settings_is_refused_by_name(name, settings):
    with pytest.raises(UserError) as caught:
        to_published(model(**settings))
    value = settings[name]
    assert f"the published code has no {name}={value!r}" in str(caught.value)
    assert "code-*" in str(caught.value)


def test_exporting_normed_branches_is_refused_by_name():
    normed = GPTConfig(vocab_size=11, context=8, layers=1, heads=2, dim=8, out_norm=0.5)
    with pytest.raises(UserError, match=r"the published code has no out_norm=0\.5"):
        to_published(GPT(normed))


def test_exporting_another_width_of_the_mlp_is_refused_by_name():
    narrow = GPTConfig(vocab_size=11, context=8, layers=1, heads=2, dim=8, mlp_dim=5)
    with pytest.raises(UserError, match=r"the published code has no mlp_dim=5"):
        to_published(GPT(narrow))


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("code-")])
def test_no_other_preset_is_exported(name):
    settings = PRESETS[name]
    with pytest.raises(UserError, match="the published code has no"):
        to_published(GPT(GPTConfig(vocab_size=11, context=8, layers=1, heads=2, dim=8, residual=settings)))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("code-")])
def test_the_published_presets_go_out_and_come_back(name):
    residual = PRESETS[name]
    sizes = {"vocab_size": 11, "context": 8, "layers": 2, "heads": 2, "dim": 8}
    config = GPTConfig(**sizes, embedding_std=0.02, residual=residual)  # the published default
    made = GPT(config, seed=3)
    keys: dict[str, Any] = {"vocab_size": 11, "block_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    back = load_published(keys | {"hidden_size": 8, "head_dim": 4}, to_published(made))
    assert back.config == dataclasses.replace(config, head_dim=4, residual=back.config.residual)
    unused = ResidualConfig()  # settings that the others make irrelevant
    fields = {field.name for field in dataclasses.fields(ResidualConfig)}
    assert {name for name in fields if getattr(back.config.residual, name) != getattr(residual, name)} <= {
        name for name in ("compression_sharing", "gate_hidden_bias") if getattr(residual, name) == getattr(unused, name)
    }
    assert all(tensor.equal(back.state_dict()[key]) for key, tensor in made.state_dict().items())


def test_gradients_before_backward():
    with pytest.raises(UserError, match=r"has no gradient; call loss\.backward"):
        to_published(model(), grads=True)

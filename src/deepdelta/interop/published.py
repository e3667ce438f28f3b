"""The authors' published models: their configuration keys and tensor names to ours, and back.

Their state is (batch, token, D, V) with V fastest, ours (batch, token, V, D): tensors that run over both are
transposed on the way. The variant is not in their configuration; it is recognised from the tensor names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from deepdelta.config import from_plain
from deepdelta.errors import UserError, nearest
from deepdelta.limits import check_memory
from deepdelta.models import GPT, GPTConfig, least_bytes, parameter_shapes
from deepdelta.nn.config import LEAST_GATE
from deepdelta.tensors import check_finite

SIZES = {
    "vocab_size": ("vocab_size", 50304),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 6),
    "hidden_size": ("dim", 768),
    "head_dim": ("head_dim", 128),
    "block_size": ("context", 1024),
    "rope_base": ("rope_base", 10000.0),
    "rope_ratio": ("rope_fraction", 1.0),
    "use_qk_rmsnorm": ("qk_norm", True),
    "embedding_init_std": ("embedding_std", 0.02),
    "hidden_init_std_factor": ("init_factor", 0.5),
}
"""Published key: our field of GPTConfig, and the published default."""


@dataclass(frozen=True, kw_only=True)
class PublishedResidual:
    """Published keys of the residual, with their defaults.

    The read's start and the causal flag change nothing here: the tensors are loaded, and the published forward ignores
    the flag.
    """

    ddl_value_channels: int = 4
    ddl_state_shortconv_kernel_size: int | None = None
    """None: V for channel compression, 4 for token compression."""
    ddl_state_read_init: float | None = None
    ddl_state_dv_shortconv_causal: bool = False
    input_embed_shortconv_kernel_size: int = 4
    ddl_k_eps: float = 1e-5
    ddl_beta_hidden_size: int = 128
    ddl_beta_single_linear: bool = True
    ddl_beta_init: float = 1.0
    ddl_v_sigmoid: bool = True
    ddl_v_sigmoid_scale: float = 4.0
    ddl_v_constant: bool = False
    ddl_v_constant_value: float = 2.0
    ddl_v_dim1_constant: bool = False
    ddl_v_dim1_constant_value: float = 2.0


MOST_NAMED = 20
"""Missing tensors that a message names."""

RESIDUAL = tuple(field.name for field in fields(PublishedResidual))

ONLY_AT_DEFAULT: dict[str, Any] = {
    "using_groupnorm": False,
    "use_output_gate": False,
    "use_k_shift": False,
    "use_v_shift": False,
    "q_activation": None,
    "k_activation": None,
    "v_activation": None,
    "mup": False,
    "bias": False,
    "dropout": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
"""Published keys that change the model in ways that have no counterpart here."""

BOOKKEEPING = frozenset(
    """architectures model_type auto_map dtype torch_dtype transformers_version _name_or_path name variant
    kv_cache_slot_size hidden_size_base use_cache return_dict""".split()
)
"""Keys that say nothing about the numbers."""


@dataclass(frozen=True)
class Layout:
    """How a tensor's published axes become ours, and back."""

    inward: Callable[[Tensor, int], Tensor]
    outward: Callable[[Tensor], Tensor]


SAME = Layout(lambda tensor, channels: tensor, lambda tensor: tensor)
# (D * V, K) with V fastest, or (D * V, 1, K) for the embedding convolution, to (V, D, K).
TOKEN = Layout(
    lambda tensor, channels: tensor.reshape(-1, channels, tensor.shape[-1]).transpose(0, 1),
    lambda tensor: tensor.transpose(0, 1).flatten(0, 1),
)
EMBEDDING = Layout(
    lambda tensor, channels: TOKEN.inward(tensor.squeeze(1), channels),
    lambda tensor: TOKEN.outward(tensor).unsqueeze(1),
)

WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""What torch.compile, activation checkpointing and FSDP put into the names of what they wrap, at any depth."""

HELD = ("module.", "model.")
"""What stands before every name where a module of DDP or of a trainer holds the model."""

BRANCH_NAMES = {
    "attention": {"attn.c_q": "query", "attn.c_k": "key", "attn.c_v": "value", "attn.c_proj": "out"}
    | {"attn.q_rms": "query_norm", "attn.k_rms": "key_norm"},
    "mlp": {"mlp.c_fc1": "gate", "mlp.c_fc2": "up", "mlp.c_proj": "out"},
}
RESIDUAL_NAMES = {"beta": "gate.outer", "beta_in": "gate.inner", "beta_out": "gate.outer", "v_proj": "target.map"}
COMPRESSION_NAMES = {
    "channel_conv": {"weight": ("weight", SAME), "read": ("read", SAME)},
    "token": {"shortconv.weight": ("weight", TOKEN), "read": ("read", SAME)},
    "channel": {},
}


def load_published(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GPT:
    """The published model with these tensors, as a GPT of this library.

    Args:
        config: the published configuration keys; missing ones take the published defaults.
        tensors: the published parameters by name; `lm_head.weight` may stand beside the embedding it is tied to. Names
            may have what wrappers put into them; see `plain_names`.

    Returns:
        A model with `model(input_ids, labels=None)`, logits, loss and gradients as the published code gives them. A
        constant target leaves the published `v_proj` without use: those tensors are kept for `to_published`.

    Raises:
        UserError: an unknown key (the nearest one is named), a setting without a counterpart here, a missing or
            unknown tensor, one of the wrong shape, or one that holds NaN or infinity.
    """
    tensors = plain_names(tensors)
    settings = _model_config(config, tensors)
    given = dict(tensors)
    head = given.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, given.get("transformer.wte.weight", head)):
        raise UserError(
            "lm_head.weight must equal transformer.wte.weight: the published head is tied to the embedding."
        )
    # Names before shapes, and shapes before numbers: what is made never exceeds what the tensors themselves are. Where
    # there are fewer tensors than layers, the first layers show what is missing.
    layers = min(settings.layers, len(tensors) + 1)
    names = published_names(replace(settings, layers=layers))
    unused_shapes = _unused_shapes(replace(settings, layers=layers))
    unused = {name: given.pop(name) for name in unused_shapes if name in given}
    if missing := [name for name in names if name not in given]:
        more = f" and {len(missing) - MOST_NAMED:,} more" if len(missing) > MOST_NAMED else ""
        raise UserError(f"the published tensors {', '.join(missing[:MOST_NAMED])}{more} are missing.")
    if unknown := sorted(set(given) - set(names)):
        raise UserError(f"unknown tensor '{unknown[0]}'; {nearest(unknown[0], names)}")
    for name, tensor in unused.items():
        _check_tensor(name, tensor, unused_shapes[name])
    shapes = parameter_shapes(settings)
    for name, (ours, layout) in names.items():
        outward = layout.outward(torch.empty(shapes[ours], device="meta"))
        _check_tensor(name, given[name], tuple(outward.shape))
    check_memory(least_bytes(settings), "the published model")
    check_finite(unused | given, "a published checkpoint")
    model = GPT(settings)
    own, channels = dict(model.named_parameters()), settings.residual.value_channels
    with torch.no_grad():
        for name, (ours, layout) in names.items():
            own[ours].copy_(layout.inward(given[name], channels))
    model.unused_published = {name: tensor.clone() for name, tensor in unused.items()}
    return model


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that they have in the model itself.

    Left out are what torch.compile, activation checkpointing and FSDP put anywhere into a name, and what DDP and
    trainers put in front of every one, `module.` and `model.`.

    Raises:
        UserError: two tensors come to the same name.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPED) for name in tensors}
    while names and (held := [one for one in HELD if all(name.startswith(one) for name in names.values())]):
        names = {name: short.removeprefix(held[0]) for name, short in names.items()}
    found: dict[str, str] = {}
    for name, short in names.items():
        if (other := found.setdefault(short, name)) != name:
            raise UserError(f"the published tensors '{other}' and '{name}' are both '{short}'; leave one out.")
    return {short: tensors[name] for short, name in found.items()}


def to_published(model: GPT, grads: bool = False) -> dict[str, Tensor]:
    """The model's parameters under the published names and in the published layout; with `grads`, their gradients.

    Raises:
        UserError: the model has settings that the published code does not have, or a gradient is missing.
    """
    _check_published(model.config)
    own = dict(model.named_parameters())
    result = {} if grads else {name: tensor.clone() for name, tensor in model.unused_published.items()}
    for name, (ours, layout) in published_names(model.config).items():
        tensor = own[ours].grad if grads else own[ours].detach()
        if tensor is None:
            raise UserError(f"{ours} has no gradient; call loss.backward() first.")
        result[name] = layout.outward(tensor).contiguous()
    return result


def published_config(config: GPTConfig) -> dict[str, Any]:
    """The published keys of a model with this configuration, from which `load_published` reads it again.

    Raises:
        UserError: the model has settings that the published code does not have.
    """
    _check_published(config)
    residual, scalar = config.residual, config.residual.value_channels == 1
    whole = replace(config, head_dim=config.head_width, embedding_std=config.embedding_scale)
    constant = residual.target == "constant"
    setting = PublishedResidual(
        ddl_value_channels=residual.value_channels,
        ddl_state_shortconv_kernel_size=None if scalar else residual.compression_kernel,
        input_embed_shortconv_kernel_size=residual.expansion_kernel,
        ddl_k_eps=residual.direction_eps,
        ddl_beta_hidden_size=residual.gate_hidden,
        ddl_beta_single_linear=residual.gate == "linear",
        ddl_beta_init=residual.gate_init,
        ddl_v_sigmoid=residual.target != "linear_input",
        ddl_v_sigmoid_scale=residual.target_scale,
        ddl_v_constant=constant and not scalar,
        ddl_v_constant_value=residual.target_value,
        ddl_v_dim1_constant=constant and scalar,
        ddl_v_dim1_constant_value=residual.target_value,
    )
    return {theirs: getattr(whole, ours) for theirs, (ours, _) in SIZES.items()} | vars(setting)


def published_names(config: GPTConfig) -> dict[str, tuple[str, Layout]]:
    """Published tensor name: our parameter name, and how the axes are laid out."""
    residual = config.residual
    names: dict[str, tuple[str, Layout]] = {
        "transformer.wte.weight": ("embedding.weight", SAME),
        "ln_f.weight": ("norm.weight", SAME),
    }
    compression = COMPRESSION_NAMES[residual.compression]
    if residual.expansion == "embedding_conv":
        names["input_embed.conv.weight"] = ("stream.expansion.weight", EMBEDDING)
    for theirs, (ours, layout) in compression.items():
        names[f"readout.{theirs}"] = (f"stream.readout.{ours}", layout)
    gate = (
        ["beta.weight", "beta.bias"]
        if residual.gate == "linear"
        else ["beta_in.weight", "beta_out.weight", "beta_out.bias"]
    )
    target = [] if residual.target == "constant" else ["v_proj.weight", "v_proj.bias"]
    for layer in range(config.layers):
        theirs_layer, ours_layer = f"transformer.h.{layer}", f"layers.{layer}"
        for theirs, (ours, layout) in compression.items():
            names[f"{theirs_layer}.compress.{theirs}"] = (f"{ours_layer}.attention.compression.{ours}", layout)
        for number, (sublayer, short) in enumerate({"attention": "attn", "mlp": "mlp"}.items(), start=1):
            names[f"{theirs_layer}.ln_{number}.weight"] = (f"{ours_layer}.{sublayer}.norm.weight", SAME)
            for theirs, ours in BRANCH_NAMES[sublayer].items():
                if config.qk_norm or not theirs.endswith("rms"):
                    names[f"{theirs_layer}.{theirs}.weight"] = (f"{ours_layer}.{sublayer}.branch.{ours}.weight", SAME)
            for tensor in gate + target:
                part, kind = tensor.split(".")
                ours = f"{ours_layer}.{sublayer}.{RESIDUAL_NAMES[part]}.{kind}"
                names[f"{theirs_layer}.ddl_{short}.{tensor}"] = (ours, SAME)
    return names


def _model_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GPTConfig:
    known = {*SIZES, *RESIDUAL, *ONLY_AT_DEFAULT, *BOOKKEEPING}
    for key, value in config.items():
        if key not in known:
            raise UserError(f"unknown configuration key '{key}'; {nearest(key, known)}")
        if key in ONLY_AT_DEFAULT and value != ONLY_AT_DEFAULT[key]:
            raise UserError(f"{key}={value!r} is not supported; only its default {ONLY_AT_DEFAULT[key]!r} is.")
    sizes = {ours: config.get(theirs, default) for theirs, (ours, default) in SIZES.items()}
    return from_plain(GPTConfig, sizes | {"residual": _residual(config, tensors)}, where="published configuration")


def _residual(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    given = {key: value for key, value in config.items() if key in RESIDUAL}
    setting = from_plain(PublishedResidual, given, where="published configuration")
    names = set(tensors)
    token = any(name.endswith("compress.shortconv.weight") for name in names)
    channel = any(name.endswith("compress.weight") for name in names)
    channels = setting.ddl_value_channels if token or channel else 1
    if token and channels < 2:
        raise UserError(
            f"published models with token compression have ddl_value_channels of at least 2, got {channels}."
        )
    constant, value = setting.ddl_v_constant, setting.ddl_v_constant_value
    if channels == 1:
        constant, value = setting.ddl_v_dim1_constant, setting.ddl_v_dim1_constant_value
    kernel = setting.ddl_state_shortconv_kernel_size
    return {
        "value_channels": channels,
        "direction_eps": setting.ddl_k_eps,
        "target": "constant" if constant else "scaled_sigmoid" if setting.ddl_v_sigmoid else "linear_input",
        "target_scale": setting.ddl_v_sigmoid_scale,
        "target_value": value,
        "gate": "linear" if setting.ddl_beta_single_linear else "two_layer",
        # The tensors hold the gate; where it once started is of no effect.
        "gate_init": min(max(setting.ddl_beta_init, LEAST_GATE), 2 - LEAST_GATE),
        "gate_hidden": setting.ddl_beta_hidden_size,
        "gate_hidden_bias": False,
        "expansion": "embedding_conv" if "input_embed.conv.weight" in names else "repeat",
        "expansion_kernel": setting.input_embed_shortconv_kernel_size,
        "compression": "token" if token else "channel_conv" if channel else "channel",
        "compression_kernel": (channels if channel else 4) if kernel is None else kernel,
        "compression_init": "random" if token or channel else "identity",
        "compression_sharing": "block",
    }


def _unused_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The published tensors that a constant target leaves without use."""
    if config.residual.target != "constant":
        return {}
    channels = config.residual.value_channels
    return {
        f"transformer.h.{layer}.ddl_{sublayer}.v_proj.{kind}": shape
        for layer in range(config.layers)
        for sublayer in ("attn", "mlp")
        for kind, shape in (("weight", (channels, config.dim)), ("bias", (channels,)))
    }


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise UserError(
            f"{name} must be a floating-point tensor of shape {shape}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}."
        )


def _check_published(config: GPTConfig) -> None:
    for name in ("out_norm", "repeats"):
        if (value := getattr(config, name)) is not None:
            raise UserError(f"the published code has no {name}={value} (only None).")
    if config.mlp_width != replace(config, mlp_dim=None).mlp_width:
        raise UserError(f"the published code has no mlp_dim={config.mlp_dim} (only None, floor(8/3 dim)).")
    residual = config.residual
    allowed: dict[str, tuple[Any, ...]] = {
        "rule": ("delta",),
        "rank": (1,),
        "direction": ("branch",),
        "direction_norm": ("unit",),
        "target": ("scaled_sigmoid", "linear_input", "constant"),
        "gate": ("linear", "two_layer"),
        "gate_range": (2,),
        "gate_per_channel": (False,),
        "compression": ("channel",) if residual.value_channels == 1 else ("channel_conv", "token"),
        "compression_causal": (False,),
        "query": (False,),
        "norm": ("rms",),
        "norm_eps": (1e-5,),
    }
    if residual.gate == "two_layer":
        allowed["gate_hidden_bias"] = (False,)
    if residual.value_channels > 1:
        allowed["compression_sharing"] = ("block",)
    for name, values in allowed.items():
        if getattr(residual, name) not in values:
            raise UserError(
                f"the published code has no {name}={getattr(residual, name)!r} "
                f"(only {', '.join(repr(value) for value in values)}); the presets code-* have its settings."
            )

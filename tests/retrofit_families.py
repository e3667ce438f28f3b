"""Tiny models of every family of transformers that `retrofit` has a table for, with dropout and random weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retrofit_models import IDS, SIZES, TEXT, VOCABULARY, numbers, transformers

DROP = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
IMAGES = {"image_size": 12, "patch_size": 4, "num_labels": 5}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS: dict[str, Any] = {"num_hidden_layers": 2}
MANY: dict[str, Any] = TEXT | LAYERS | {"attention_dropout": 0.2}


class Model(NamedTuple):
    kind: str
    config: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    residuals: int
    generates: bool = False


IMAGE = {"pixel_values": numbers(2, 3, 12, 12)}
PICTURE = {"pixel_values": numbers(2, 3, 64, 64)}
WORDS = {"input_ids": IDS}
BOTH = WORDS | {"decoder_input_ids": IDS[:, :6]}
BERT: dict[str, Any] = SIZES | LAYERS | DROP | {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.2, "decoder_start_token_id": 0,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 10, "max_target_positions": 32, "decoder_start_token_id": 1, "dropout": 0.2,
    "activation_dropout": 0.1, **SPECIAL,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "text_config": SIZES | LAYERS | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2},
    "vision_config": SIZES | {"image_size": 12, "patch_size": 4},
    "projection_dim": 16,
}
CONV: dict[str, Any] = {"depths": [2, 1, 1], "num_labels": 5}
OPT: dict[str, Any] = SIZES | LAYERS | {
    "vocab_size": VOCABULARY, "ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 32, "dropout": 0.2,
    **SPECIAL,
}  # fmt: skip
NEOX: dict[str, Any] = TEXT | LAYERS | {"hidden_dropout": 0.2, "attention_dropout": 0.2, "rotary_pct": 0.5}

MODELS: dict[str, Model] = {
    "mistral": Model("MistralForCausalLM", "MistralConfig", MANY, WORDS, 4, True),
    "mixtral": Model("MixtralForCausalLM", "MixtralConfig", MANY | {"num_local_experts": 3}, WORDS, 4, True),
    "qwen2": Model("Qwen2ForCausalLM", "Qwen2Config", MANY, WORDS, 4, True),
    "gemma": Model("GemmaForCausalLM", "GemmaConfig", MANY | {"head_dim": 8}, WORDS, 4, True),
    "smollm3": Model("SmolLM3ForCausalLM", "SmolLM3Config", MANY, WORDS, 4, True),
    "phi3": Model("Phi3ForCausalLM", "Phi3Config", MANY | {"resid_pdrop": 0.2}, WORDS, 4, True),
    "gemma2": Model("Gemma2ForCausalLM", "Gemma2Config", MANY | {"head_dim": 8}, WORDS, 4, True),
    "gemma3": Model("Gemma3ForCausalLM", "Gemma3TextConfig", MANY | {"head_dim": 8}, WORDS, 4, True),
    "olmo2": Model("Olmo2ForCausalLM", "Olmo2Config", MANY, WORDS, 4, True),
    "gpt-neox": Model("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX, WORDS, 2, True),
    "gpt-neox in turn": Model(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX | {"use_parallel_residual": False}, WORDS, 4, True
    ),
    "opt": Model("OPTForCausalLM", "OPTConfig", OPT, WORDS, 4, True),
    "opt post-norm": Model(
        "OPTForCausalLM", "OPTConfig", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, WORDS, 4, True
    ),
    "bert": Model("BertForMaskedLM", "BertConfig", BERT, WORDS, 4),
    "bert decoder": Model(
        "BertLMHeadModel",
        "BertConfig",
        BERT | {"is_decoder": True, "add_cross_attention": True},
        WORDS | {"encoder_hidden_states": numbers(3, 4, 32)},
        6,
    ),
    "roberta": Model("RobertaForSequenceClassification", "RobertaConfig", BERT | {"pad_token_id": 0}, WORDS, 4),
    "deit": Model("DeiTForImageClassification", "DeiTConfig", SIZES | LAYERS | DROP | IMAGES, IMAGE, 4),
    "dinov2": Model(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        SIZES | LAYERS | DROP | IMAGES | {"drop_path_rate": 0.2},
        IMAGE,
        4,
    ),
    "clip": Model("CLIPModel", "CLIPConfig", CLIP, WORDS | {"pixel_values": numbers(3, 3, 12, 12)}, 10),
    "t5": Model("T5ForConditionalGeneration", "T5Config", T5, BOTH, 10, True),
    "whisper": Model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        {"input_features": numbers(3, 8, 20), "decoder_input_ids": IDS[:, :6]},
        13,
    ),
    "convnext": Model(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        CONV | {"hidden_sizes": [8, 12, 16], "num_stages": 3, "drop_path_rate": 0.2},
        PICTURE,
        4,
    ),
    "resnet": Model(
        "ResNetForImageClassification",
        "ResNetConfig",
        CONV | {"hidden_sizes": [16, 24, 32], "embedding_size": 8, "layer_type": "bottleneck"},
        PICTURE,
        4,
    ),
    "resnet basic": Model(
        "ResNetForImageClassification",
        "ResNetConfig",
        CONV | {"hidden_sizes": [8, 12, 16], "embedding_size": 8, "layer_type": "basic"},
        PICTURE,
        4,
    ),
}


def made(name: str, **settings: Any) -> nn.Module:
    """In evaluation mode, every vector of its norms and every layer scale away from where it starts."""
    torch.manual_seed(0)
    one = MODELS[name]
    kind, config = getattr(transformers, one.kind), getattr(transformers, one.config)
    model = kind(config(**one.settings | settings)).eval()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # torch's grouped product has no fp64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.rand_like(parameter)
    return model


def output(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Logits, or of two towers those of the images."""
    result = called(model, inputs, **options)
    return result["logits"] if "logits" in result else result["logits_per_image"]


def called(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    dtype = next(model.parameters()).dtype
    return model(**{key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}, **options)

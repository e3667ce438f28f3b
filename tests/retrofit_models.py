"""Tiny networks of every family that `retrofit` knows, with random weights and inputs; nothing is downloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Before transformers, which imports torchvision.
from torchvision_beside_cpu_torch import models  # isort: skip
import transformers

from deepdelta import GPT, PRESETS, DeltaResidual, GPTConfig, retrofit

transformers.logging.set_verbosity_error()

VOCABULARY = 50
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = SIZES | {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | changes))


def qwen3(**changes: Any) -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT | {"head_dim": 8} | changes))


def gpt2(**changes: Any) -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2_SIZES | NO_DROPOUT | changes))


def vit(**changes: Any) -> nn.Module:
    images = {"image_size": 12, "patch_size": 4, "num_labels": 5}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES | images | changes))


def basic_resnet() -> nn.Module:
    """Eight-block ResNet-18, half as deep."""
    return settled(models.ResNet(models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=7))


def bottleneck_resnet() -> nn.Module:
    """ResNet-50 with five blocks: one changes the width alone."""
    return settled(models.ResNet(models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=7))


def settled(network: nn.Module) -> nn.Module:
    """With running statistics and affine weights away from 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.0)
    return network


def encoder(norm_first: bool = False, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first} | changes
    layer = nn.TransformerEncoderLayer(16, 2, 32, **options)
    stack = nn.TransformerEncoder(
        layer, 3, nn.LayerNorm(16), enable_nested_tensor=options["batch_first"] and not norm_first
    )
    for module in stack.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return stack


def gpt() -> nn.Module:
    return GPT(GPTConfig(vocab_size=VOCABULARY, dim=32, layers=3, context=32, residual=PRESETS["additive"]))


class Family(NamedTuple):
    make: Callable[[], nn.Module]
    x: Tensor
    blocks: int
    residuals: int


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


IDS = torch.randint(1, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))
FAMILIES: dict[str, Family] = {
    "llama": Family(llama, IDS, 3, 6),
    "qwen3": Family(qwen3, IDS, 3, 6),
    "gpt2": Family(gpt2, IDS, 3, 6),
    "vit": Family(vit, numbers(3, 3, 12, 12), 3, 6),
    "basic": Family(basic_resnet, numbers(4, 3, 64, 64), 5, 5),
    "bottleneck": Family(bottleneck_resnet, numbers(4, 3, 64, 64), 5, 5),
    "post-norm": Family(encoder, numbers(3, 7, 16), 3, 6),
    "pre-norm": Family(lambda: encoder(norm_first=True), numbers(3, 7, 16), 3, 6),
    "layer": Family(lambda: encoder().layers[0], numbers(3, 7, 16), 1, 2),
    "gpt": Family(gpt, IDS, 3, 6),
}


def made(name: str, seed: int = 0) -> nn.Module:
    """In evaluation mode."""
    torch.manual_seed(seed)
    return FAMILIES[name].make().eval()


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, or what the model returns."""
    if x.is_floating_point():
        x = x.to(next(model.parameters()).dtype)
    result = model(x)
    return getattr(result, "logits", result)


def residuals(model: nn.Module) -> dict[str, DeltaResidual]:
    return {name: part for name, part in model.named_modules() if isinstance(part, DeltaResidual)}


def open_gates(model: nn.Module, size: float = 0.7) -> None:
    """As if trained: erase, and value channels that differ."""
    torch.manual_seed(1)
    for residual in residuals(model).values():
        nn.init.constant_(residual.erase_gate.opening, size)
        if hasattr(residual, "write"):
            nn.init.normal_(residual.write.map.weight, std=0.1)


def tensors_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def moved(name: str, **options: Any) -> nn.Module:
    """Retrofitted and changed everywhere, buffers too."""
    model = retrofit(made(name), seed=0, **options)
    open_gates(model)
    if options.get("trainable") != "residual":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.01
    return model

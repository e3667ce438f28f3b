"""What other tools do to linear layers reaches those of a GPT: quantisation by torch and torchao, LoRA by PEFT."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic

from deepdelta import GPT, PRESETS, GPTConfig, use_backend
from deepdelta.decoding import DecodingCache
from deepdelta.nn import Linear, initialise
from helpers import perturb

pytestmark = pytest.mark.usefixtures("unchecked_file")
IDS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
LABELS = IDS.roll(-1, 1)
BRANCHES = ["query", "key", "value", "out", "gate", "up", "out"]
backends = pytest.mark.parametrize("backend", ["reference", "fused"])


def model_of(backend: str, preset: str = "paper-cc") -> GPT:
    model = GPT(GPTConfig(vocab_size=11, dim=12, heads=2, layers=2, context=8, residual=PRESETS[preset]), seed=3)
    perturb(model, size=0.1)
    use_backend(model, backend)
    return model


def decoded(model: GPT) -> Tensor:
    cache = DecodingCache(model, len(IDS))
    return torch.cat([cache.decode(IDS[:, :3]), *(cache.decode(IDS[:, i : i + 1]) for i in range(3, 6))], 1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@backends
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantize_dynamic(backend: str) -> None:
    """Every map of the branches becomes int8; the gates and targets, of a few rows, stay as they are."""
    model = model_of(backend)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = [name for name, module in quantised.named_modules() if isinstance(module, dynamic.Linear)]
    assert [name.rpartition(".")[2] for name in found] == 2 * BRANCHES
    expected = copy.deepcopy(model)
    for name in found:
        weight = quantised.get_submodule(name).weight()
        assert weight.dtype == torch.qint8
        with torch.no_grad():
            expected.get_submodule(name).weight.copy_(weight.dequantize())
    # What is left is the rounding of the inputs to 8 bits.
    error = (quantised(IDS).logits - expected(IDS).logits).norm() / expected(IDS).logits.norm()
    assert 0 < error < 0.1
    # All ids at once: inputs are scaled by the largest number of a call.
    close(DecodingCache(quantised, len(IDS)).decode(IDS), quantised(IDS).logits)


@backends
def test_torchao(backend: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of(backend)
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    expected = copy.deepcopy(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 14 + 2 * 2 * 2  # A gate and a target per residual.
    for name in linear:
        weight = quantised.get_submodule(name).weight
        assert type(weight) is not nn.Parameter, name
        with torch.no_grad():
            expected.get_submodule(name).weight.copy_(weight.dequantize())
    close(quantised(IDS).logits, expected(IDS).logits, 1e-3)
    close(decoded(quantised), quantised(IDS).logits, 1e-3)


GATES = ["map", "outer"]


@pytest.mark.parametrize(
    ("preset", "targets", "backend"),
    [
        ("additive", ["query", "value"], "reference"),
        ("code-cc", "all-linear", "reference"),
        *(("paper-cc", targets, backend) for targets in ("all-linear", GATES) for backend in ("reference", "fused")),
        ("code-cc", GATES, "fused"),
    ],
    ids=str,
)
def test_lora(preset: str, targets: str | list[str], backend: str, tmp_path: Path) -> None:
    """LoRA trains on a GPT, and merged into its weights it gives the same logits, cached decoding too."""
    peft = pytest.importorskip("peft")
    model = model_of(backend, preset)
    plain = model(IDS).logits
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
    close(adapted(IDS).logits, plain)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = adapted(IDS, LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unused = [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not unused
    trained = adapted(IDS).logits
    close(decoded(model), trained)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_of(backend, preset), tmp_path)
    close(loaded(IDS).logits, trained)
    merged = adapted.merge_and_unload()
    assert merged is model and all(type(p) is nn.Parameter for p in merged.parameters())
    close(merged(IDS).logits, trained, 1e-4)


def test_linear_is_torchs() -> None:
    torch.manual_seed(0)
    linear = Linear(5, 3, std=0.5, bias=1.0)
    # Building one leaves torch's generator as it was.
    assert torch.initial_seed() == 0 and torch.equal(torch.rand(4), torch.rand(4, generator=torch.manual_seed(0)))
    assert isinstance(linear, nn.Linear) and (linear.in_features, linear.out_features) == (5, 3)
    initialise(linear, 1, "a")
    x = torch.randn(2, 5)
    close(linear(x), x @ linear.weight.T + 1)
    # Tools that ask a layer to start anew get a start of its own kind.
    before = linear.weight.clone()
    with torch.no_grad():
        linear.bias.zero_()
    linear.reset_parameters()
    assert not torch.equal(linear.weight, before) and torch.equal(linear.bias, torch.ones(3))
    wide = Linear(400, 300, std=0.5)
    wide.reset_parameters()
    assert wide.weight.std().item() == pytest.approx(0.5, rel=0.02)

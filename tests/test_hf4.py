"""With transformers 4.57: retrofits of the first four families. `make test-hf-4` runs those of `deepdelta.hf`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

import deepdelta.hf  # noqa: F401
from deepdelta import UserError, load_retrofit, retrofit, save_retrofit, undo_retrofit

pytestmark = pytest.mark.hf4

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | {"vocab_size": 50, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
GPT2 = {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IDS = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def made_of(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(3)
        return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()  # type: ignore[no-any-return]

    return made


FAMILIES = {
    "llama": (made_of("LlamaForCausalLM", "LlamaConfig", **TEXT), "AutoModelForCausalLM"),
    "qwen3": (made_of("Qwen3ForCausalLM", "Qwen3Config", **TEXT, head_dim=8), "AutoModelForCausalLM"),
    "gpt2": (made_of("GPT2LMHeadModel", "GPT2Config", **GPT2), "AutoModelForCausalLM"),
    "vit": (
        made_of("ViTForImageClassification", "ViTConfig", **SIZES, image_size=12, patch_size=4, num_labels=5),
        "AutoModelForImageClassification",
    ),
}
NAMES = pytest.mark.parametrize("name", FAMILIES)


def inputs(name: str) -> Tensor:
    return IMAGES if name == "vit" else IDS


def added(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if ".delta." in name}


def opened(model: nn.Module) -> None:
    """Gates and writes away from their start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in added(model).values():
        assert parameter.requires_grad
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_it_is_that_line():
    assert transformers.__version__.startswith("4.57.")


@pytest.mark.compatible("retrofit: Llama, Qwen3, GPT-2, ViT exact at the start, saved, restored", "transformers")
@NAMES
@pytest.mark.parametrize(("channels", "tolerance"), [(1, 0.0), (4, 1e-5)])
@pytest.mark.parametrize("training", [False, True])
def test_it_computes_at_first_what_the_plain_model_does(name, channels, tolerance, training):
    make, _ = FAMILIES[name]
    plain, model = make().train(training), retrofit(make(), channels).train(training)
    wanted = {"output_hidden_states": True, "output_attentions": False}
    torch.manual_seed(7)
    expected = plain(inputs(name), **wanted)
    torch.manual_seed(7)
    found = model(inputs(name), **wanted)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=tolerance)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for one, two in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance)
    undo_retrofit(model)
    torch.manual_seed(7)
    assert model(inputs(name)).logits.equal(expected.logits)


@NAMES
def test_in_fp64(name):
    make, _ = FAMILIES[name]
    x = inputs(name).double() if name == "vit" else inputs(name)
    torch.testing.assert_close(retrofit(make().double(), 4)(x).logits, make().double()(x).logits, rtol=0, atol=1e-12)


def test_attention_weights_of_gpt2():
    make, _ = FAMILIES["gpt2"]
    plain, model = make(), retrofit(make(), 1)
    for one in (plain, model):
        one.set_attn_implementation("eager")
    found, expected = (one(IDS, output_attentions=True).attentions for one in (model, plain))
    assert len(found) == 3 and all(one.equal(two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generation(name, options):
    make, _ = FAMILIES[name]
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | options
    model = retrofit(make(), 4)
    assert model.generate(IDS, **given).equal(make().generate(IDS, **given))
    opened(model)
    assert model.generate(IDS, **given).equal(model.generate(IDS, **given, use_cache=False))


@NAMES
def test_saved_and_restored(name, tmp_path):
    make, auto = FAMILIES[name]
    model = retrofit(make(), 3)
    opened(model)
    x = inputs(name)
    expected = model(x).logits
    save_retrofit(model, tmp_path / "added")
    assert load_retrofit(make(), tmp_path / "added")(x).logits.equal(expected)
    model.save_pretrained(tmp_path / "whole")
    torch.save({"x": x, "logits": expected}, tmp_path / "told.pt")
    code = f"""
import torch, deepdelta.hf
from transformers import {auto}
told = torch.load({str(tmp_path / "told.pt")!r})
model = {auto}.from_pretrained({str(tmp_path / "whole")!r})
assert model(told["x"]).logits.equal(told["logits"])
print(type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{type(make()).__name__}\n", done.stderr
    with pytest.raises(Exception, match=r"(?s).*"):
        type(make()).from_pretrained(tmp_path / "whole")


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[i % 2], "labels": IDS[i % 2]}


@pytest.mark.compatible("a retrofitted Llama under the Trainer", "transformers", "accelerate")
def test_the_trainer_trains_a_retrofit(tmp_path: Path):
    make, auto = FAMILIES["llama"]
    model = retrofit(make(), 2)
    before = {name: one.clone() for name, one in added(model).items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, save_steps=2, weight_decay=0.0,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    assert any(not one.equal(before[name]) for name, one in added(model).items())
    back = getattr(transformers, auto).from_pretrained(tmp_path / "checkpoint-2")
    assert back(IDS).logits.equal(model.eval()(IDS).logits)


def test_other_families_are_refused_by_name():
    sizes = TEXT | {"num_key_value_heads": 2}
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))
    with pytest.raises(UserError, match=r"of transformers 4.57 retrofit knows .*LlamaModel.* alone, got MistralModel"):
        retrofit(mistral)

"""A retrofit by transformers' own ways: save_pretrained, the Auto classes, Trainer, here and in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import retrofit_families
import retrofit_models
from deepdelta import UserError, retrofit, retrofitted, undo_retrofit
from deepdelta.hf import retrofits
from retrofit_families import MODELS
from retrofit_models import FAMILIES, IDS, llama, open_gates, transformers

HEADS = {
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
    "gemma3": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "clip": "AutoModel",
    "resnet": "AutoModelForImageClassification",
    "mixtral": "AutoModelForCausalLM",
}


def opened(name: str, **options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if name in MODELS:
        model, inputs = retrofit_families.made(name), dict(MODELS[name].inputs)
    else:
        x = FAMILIES[name].x
        model, inputs = retrofit_models.made(name), {"pixel_values" if x.is_floating_point() else "input_ids": x}
    model = retrofit(model, 3, **options)
    open_gates(model)
    return model, inputs


def output(model, inputs):
    with torch.no_grad():
        return retrofit_families.output(model, inputs)


@pytest.mark.compatible("a retrofit restored by the Auto classes", "transformers")
@pytest.mark.parametrize("name", HEADS)
def test_saved_and_restored_by_the_auto_class(name, tmp_path):
    model, inputs = opened(name, erase_init=0.4)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    again = getattr(transformers, HEADS[name]).from_pretrained(tmp_path)
    assert type(again) is type(model) and not again.training
    assert output(again, inputs).equal(expected)
    one, two = retrofitted(model), retrofitted(again)
    assert (one.families, one.config, dict(one.added)) == (two.families, two.config, dict(two.added))
    # And once more: what was loaded saves itself, as a retrofit or, undone, as a plain model.
    again.save_pretrained(tmp_path / "again")
    restored = getattr(transformers, HEADS[name]).from_pretrained(tmp_path / "again")
    assert output(restored, inputs).equal(expected)
    undo_retrofit(restored).save_pretrained(tmp_path / "plain")
    plain = type(restored).from_pretrained(tmp_path / "plain")
    assert output(plain, inputs).equal(output(restored, inputs)) and not output(plain, inputs).equal(expected)


@pytest.mark.parametrize("name", ["llama", "t5", "resnet", "clip"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "num_labels": 3}], ids=["", "options"])
def test_any_other_class_fails_on_it(name, options, tmp_path):
    model, _ = opened(name)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deepdelta-retrofit"
    for kind in (type(model), transformers.LlamaForCausalLM, transformers.BertModel):
        with pytest.raises(Exception, match="a retrofit by deepdelta, no plain model"):
            kind.from_pretrained(tmp_path, **options)


def test_another_head_and_what_has_none(tmp_path):
    model, inputs = opened("llama")
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base) is transformers.LlamaModel
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        assert base(**inputs).last_hidden_state.equal(expected)
    with pytest.raises(UserError, match=r"AutoModelForMaskedLM has no model for LlamaConfig; .* of a LlamaForCausalLM"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    assert retrofitted(fresh).config == retrofitted(model).config
    config.save_pretrained(tmp_path / "config")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "config")
    assert again.plain.to_diff_dict() == config.plain.to_diff_dict() and again.mark == config.mark


def test_dtype_and_device_maps(tmp_path):
    model, inputs = opened("llama", trainable="residual")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    kind = transformers.AutoModelForCausalLM
    half = kind.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == "eager"
    again = kind.from_pretrained(tmp_path, device_map="cpu")
    assert output(again, inputs).equal(output(model, inputs))
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name for name, one in again.named_parameters() if one.requires_grad} == trained
    assert all(one.requires_grad for one in undo_retrofit(again).parameters())
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    split |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    offloaded = kind.from_pretrained(tmp_path, device_map=split, offload_folder=tmp_path / "offload")
    assert offloaded.model.layers[1].delta.mlp.compression.weight.is_meta
    # Maps whose weights come and go are called one by one, and so round otherwise than as one.
    torch.testing.assert_close(output(offloaded, inputs), output(model, inputs), rtol=1e-5, atol=1e-5)


def test_a_part_of_a_model_and_files_that_lack_something(tmp_path):
    model = llama()
    retrofit(model, 2)
    model.save_pretrained(tmp_path / "whole", state_dict={"lm_head.weight": model.lm_head.weight})
    with pytest.raises(UserError, match=r"does not hold what the retrofit added: missing tensors \['model.layers.0"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    whisper = retrofit_families.made("whisper")
    retrofit(whisper.model.encoder, 2)
    whisper.save_pretrained(tmp_path / "part")
    with pytest.raises(UserError, match=r"a retrofit of \['WhisperEncoder'\], and .* holds \['WhisperEncoder', 'Whi"):
        transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "part")
    one = llama()
    two = type(one)(one.config)
    retrofit(one, 2), retrofit(two, 3)
    two.save_pretrained(tmp_path / "shared")
    with pytest.raises(UserError, match="models that share their settings and were retrofitted differently"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shared")


# The whole way: retrofit a Llama, train it by Trainer, save it, load it in a fresh process, generate


def trainer(model: nn.Module, folder: Path, steps: int) -> transformers.Trainer:
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=3, report_to=[],
        use_cpu=True, learning_rate=1e-2, disable_tqdm=True, seed=0, logging_steps=1,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=rows)


LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print("deepdelta-retrofit" in str(error))
import deepdelta.hf
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[5, 7, 9]])
print(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0).tolist())
"""


@pytest.mark.compatible("a retrofitted Llama: Trainer, saved, generating in a fresh process", "transformers")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_llama_is_retrofitted_trained_saved_and_generates_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    model = retrofit(llama(), 4, seed=0)
    whole = trainer(model, tmp_path / "run", steps=4)
    whole.train()
    gates = [one for name, one in model.named_parameters() if name.endswith("opening")]
    assert all(gate.item() != 0 for gate in gates)
    # Stopped after two steps and resumed, it ends with the same numbers.
    torch.manual_seed(0)
    resumed = retrofit(llama(), 4, seed=1)
    trainer(resumed, tmp_path / "again", steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, one), two in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert one.equal(two), name
    whole.save_model(str(tmp_path / "saved"))
    expected = model.eval().generate(
        torch.tensor([[5, 7, 9]]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADS, str(tmp_path / "saved")], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["True", str(expected.tolist())], done.stderr


def test_registering_twice_changes_nothing():
    retrofits.register()
    assert transformers.AutoConfig.for_model("deepdelta-retrofit").model_type == "deepdelta-retrofit"

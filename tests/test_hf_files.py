"""The GPT as a model of transformers: files, configuration, messages, the flat file, training."""

import dataclasses
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from deepdelta import GPT, PRESETS, GPTConfig, UserError, param_groups, releases, use_backend
from deepdelta.hf import DeepDeltaConfig, DeepDeltaForCausalLM, DeepDeltaModel, DeltaDecay
from deepdelta.hf.lines import CACHE, FIVE
from hf_models import NAMES, SIZES, TC, VARIANTS, made, mask, near, tokens


@pytest.mark.compatible("save_pretrained and from_pretrained in a fresh process", "transformers", "safetensors")
def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    model, ids = made(PRESETS["code-tc"], torch.float32, bos_token_id=1), tokens()
    model.save_pretrained(tmp_path / "it")
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    torch.save({"ids": ids, "logits": model(ids).logits, "state": model.state_dict()}, tmp_path / "told.pt")
    code = f"""
import torch, deepdelta.hf
from transformers import AutoModel, AutoModelForCausalLM
told = torch.load({str(tmp_path / "told.pt")!r})
folder = {str(tmp_path / "it")!r}
for given in ({{}}, {{"device_map": "cpu"}}, {{"device_map": {{"": "cpu"}}, "dtype": "float32"}}):
    model = AutoModelForCausalLM.from_pretrained(folder, **given)
    deepdelta.use_backend(model, "reference")
    state = model.state_dict()
    assert state.keys() == told["state"].keys()
    assert all(state[name].equal(tensor) for name, tensor in told["state"].items())
    assert model.lm_head.weight is model.model.gpt.embedding.weight and not model.training
    assert model(told["ids"]).logits.equal(told["logits"])
half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
assert {{p.dtype for p in half.parameters()}} == {{torch.bfloat16}} and half.config.dtype == torch.bfloat16
error = (half(told["ids"]).logits.float() - told["logits"]).abs().max()
assert 0 < error < 0.5, error
base = AutoModel.from_pretrained(folder)
assert all(base.state_dict()[name.removeprefix("model.")].equal(tensor) for name, tensor in told["state"].items()
           if name.startswith("model."))
print(type(model).__name__, type(base).__name__, "transformers" in model.__module__)
"""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout == "DeepDeltaForCausalLM DeepDeltaModel False\n", done.stderr
    assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr


@pytest.mark.compatible("device maps with layers on the disk", "transformers", "accelerate")
def test_layers_on_the_disk(tmp_path):
    model, ids = made(PRESETS["code-tc"], torch.float32), tokens(2)
    model.save_pretrained(tmp_path)
    places = {"lm_head": "cpu", **{f"model.gpt.{part}": "cpu" for part in ("embedding", "stream", "norm", "layers.0")}}
    places["model.gpt.layers.1"] = "disk"
    away = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    use_backend(away, "reference")
    with torch.no_grad():
        near(away(ids, use_cache=False).logits, model(ids).logits, 1e-5)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert away.generate(ids, **options).equal(model.generate(ids, **options))


def test_what_is_missing_starts_as_in_a_new_model(tmp_path):
    from safetensors.torch import load_file, save_file

    config = DeepDeltaConfig.from_gpt(GPTConfig(**SIZES), seed=4)
    model = DeepDeltaForCausalLM(config)
    fresh = GPT(GPTConfig(**SIZES), seed=4)
    assert all(one.equal(two) for one, two in zip(model.model.gpt.parameters(), fresh.parameters(), strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model.save_pretrained(tmp_path)
    lost = "model.gpt.layers.1.mlp.gate.outer.weight"
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file, {"format": "pt"})
    back = DeepDeltaForCausalLM.from_pretrained(tmp_path)
    for name, parameter in back.named_parameters():
        short = name.removeprefix("model.gpt.")
        expected = dict(fresh.named_parameters())[short] if name == lost else dict(model.named_parameters())[name]
        assert parameter.equal(expected), name


def test_seeds():
    sizes = DeepDeltaConfig.from_gpt(GPTConfig(**SIZES))
    first, second = [], []
    for kept in (first, second):
        torch.manual_seed(1)
        kept += [DeepDeltaModel(sizes).gpt.embedding.weight, DeepDeltaModel(sizes).gpt.embedding.weight]
    assert first[0].equal(second[0]) and first[1].equal(second[1]) and not first[0].equal(first[1])


def test_the_configuration():
    config = GPTConfig(**SIZES, residual=PRESETS["code-tc"], out_norm=0.5, rope_fraction=0.5, embedding_std=0.1)
    ours = DeepDeltaConfig.from_gpt(config)
    assert ours.gpt() == dataclasses.replace(config, head_dim=6, mlp_dim=32)
    again = DeepDeltaConfig.from_dict(ours.to_dict())
    assert again.gpt() == ours.gpt() and again.to_dict() == ours.to_dict()
    assert AutoConfig.for_model("deepdelta", residual={"preset": "code-tc"}).gpt().residual == PRESETS["code-tc"]
    assert isinstance(AutoModel.from_config(ours), DeepDeltaModel)
    assert isinstance(AutoModelForCausalLM.from_config(ours), DeepDeltaForCausalLM)
    assert DeepDeltaConfig().gpt().residual == GPTConfig().residual


def test_more_tokens():
    model = made(dtype=torch.float32)
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(17)
    assert model.lm_head.weight is model.model.gpt.embedding.weight and model.config.vocab_size == 17
    assert model.lm_head.weight[:13].equal(before)
    assert model(tokens()).logits.shape == (3, 11, 17)


ERRORS = [
    (lambda: made()(tokens(), output_attentions=True), "output_attentions is not supported"),
    (
        lambda: made()(tokens(1, 17)),
        "context is 16 tokens (max_position_embeddings), got 17, of which the cache holds 0",
    ),
    (lambda: made()(tokens(), attention_mask=mask()[:, :4]), "attention_mask must have the shape (3, 11)"),
    *(
        [(lambda: made(TC)(tokens(), cache=DynamicCache()), "need a cache that keeps their last inputs: DynamicCache(")]
        if FIVE
        else []
    ),
    (lambda: made()(), "give either input_ids or inputs_embeds"),
    (lambda: DeepDeltaConfig(hiden_size=4), "DeepDeltaConfig: unknown key 'hiden_size'; did you mean 'hidden_size'?"),
    (lambda: DeepDeltaConfig(tie_word_embeddings=False), "a deepdelta model has tie_word_embeddings=True alone"),
    (lambda: DeepDeltaConfig(residual={"rul": "delta"}), "DeepDeltaConfig.residual: unknown key 'rul'"),
    (lambda: DeepDeltaConfig(hidden_size=0), "DeepDeltaConfig as GPTConfig"),
    (lambda: DeepDeltaConfig.from_gpt(GPTConfig(rival="mhc")), "got rival='mhc'"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[f"case{i}" for i in range(len(ERRORS))])
def test_messages(unchecked, call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)


def test_attention_backends_that_are_not_there_are_refused_by_name():
    with pytest.raises((ValueError, ImportError), match=r"flash_attention_2|Flash Attention"):
        made(attn_implementation="flash_attention_2")


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """The file of an export as a module of its own."""
    from deepdelta.hf.flat import NAME, flat_source

    file = tmp_path_factory.mktemp("flat") / f"{NAME}.py"
    file.write_text(flat_source(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[NAME]


@pytest.mark.parametrize("name", NAMES[:5] + NAMES[6:])
def test_the_flat_file_is_the_model_to_the_bit(flat, name):
    model, ids, kept = made(VARIANTS[name], torch.float32), tokens(), mask()
    other = flat.DeepDeltaForCausalLM(flat.DeepDeltaConfig.from_dict(model.config.to_dict()))
    other.load_state_dict(model.state_dict())
    found = []
    for one in (model, other):
        cache = one(ids[:, :4], attention_mask=kept[:, :4], use_cache=True)[CACHE]
        logits = one(ids[:, 4:], attention_mask=kept, cache=cache).logits
        output = one(ids, labels=ids, attention_mask=kept, output_hidden_states=True)
        gradients = torch.autograd.grad(output.loss, list(one.parameters()))
        found.append([logits, output.logits, output.loss, *output.hidden_states, *gradients])
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


def test_decay():
    model = made()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in param_groups(model.model.gpt, 0.1)[:2] for p in group["params"]}
    assert set(DeltaDecay().get_decay_parameter_names(model)) == decayed
    assert not any("gate" in name.split(".")[-3:] and "mlp.branch" not in name for name in decayed)


@pytest.mark.parametrize("groups", ["all", "ours", "no decay"])
def test_an_optimiser_that_decays_gates_is_warned_of_once(groups):
    model, ids = made(), tokens()
    model.train()
    chosen = {"all": model.parameters(), "ours": param_groups(model, 0.1), "no decay": model.parameters()}[groups]
    optimizer = torch.optim.AdamW(chosen, lr=1e-3, weight_decay=0.0 if groups == "no decay" else 0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    assert len([one for one in told if "this optimiser decays gates" in str(one.message)]) == (groups == "all")


def test_other_releases_of_transformers(monkeypatch):
    import importlib.metadata

    import deepdelta.hf

    monkeypatch.setattr(releases, "_checked", {"transformers"})
    for found in ("4.56.2", "4.58.0", "5.23.1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        with pytest.raises(UserError, match=rf"needs transformers 4\.57, or 5\.24 and newer, got {found}; install one"):
            importlib.reload(deepdelta.hf)
    monkeypatch.undo()
    importlib.reload(deepdelta.hf)


def test_a_missing_extra_is_named(tmp_path: Path):
    code = """
import sys
sys.modules["transformers"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "transformers" else found(name, *more)
import deepdelta
try:
    import deepdelta.hf
except deepdelta.UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "need the extra 'hf', but the package transformers is absent" in done.stdout, done.stderr

"""The GPT as a model of transformers: numbers, caches, generation, files, training; held against the GPT itself."""

import dataclasses
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, UserError, param_groups, releases, use_backend
from deepdelta.hf import DeepDeltaConfig, DeepDeltaForCausalLM, DeepDeltaModel, DeltaDecay
from deepdelta.hf.lines import CACHE, FIVE
from helpers import perturb, randn

SIZES: dict[str, Any] = {"vocab_size": 13, "dim": 12, "heads": 2, "head_dim": 6, "layers": 2, "context": 16}
TC = PRESETS["paper-tc"]
VARIANTS: dict[str, ResidualConfig] = {
    "additive-convolution": PRESETS["additive-convolution"],
    "code-tc": PRESETS["code-tc"],
    "paper-scalar": PRESETS["paper-scalar"],
    "ddl": PRESETS["ddl"],
    "paper-tc": TC,
    # At length: make test-hf.
    "additive": PRESETS["additive"],
    "code-cc": PRESETS["code-cc"],
    "retrofit": PRESETS["retrofit"],
    "taps-3": dataclasses.replace(TC, compression_kernel=3, expansion_kernel=2),
    "pooled-rank-2": ResidualConfig(direction="pooled", target="branch", rank=2),
    "channels": ResidualConfig(rule="channels", value_channels=3),
}
NAMES = [pytest.param(name, marks=[pytest.mark.hf] if i > 2 else []) for i, name in enumerate(VARIANTS)]
PADDING = [0, 3, 7]


def network(residual: ResidualConfig = PRESETS["ddl"], dtype: torch.dtype = torch.float64, **sizes: Any) -> GPT:
    gpt = GPT(GPTConfig(**(SIZES | sizes), residual=residual), seed=3).double()
    perturb(gpt)
    use_backend(gpt, "reference")
    return gpt.to(dtype).eval()


def made(residual: ResidualConfig = PRESETS["ddl"], dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    return DeepDeltaForCausalLM.from_gpt(network(residual, dtype), **more)


def tokens(batch: int = 3, length: int = 11) -> Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(5))


def mask(length: int = 11) -> Tensor:
    """Of rows padded on the left."""
    return (torch.arange(length) >= torch.tensor(PADDING)[:, None]).long()


def near(actual: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


@pytest.mark.compatible("dynamic and static caches, prefill in pieces", "transformers")
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_with_and_without_caches_are_those_of_the_gpt(name):
    model, ids = made(VARIANTS[name]), tokens()
    expected = model.model.gpt(ids).logits
    near(model(ids).logits, expected)
    assert model(ids, use_cache=False).logits.equal(expected)
    static = StaticCache(config=model.config, max_cache_len=13)
    for pieces, cache in (([11], None), ([1] * 11, DynamicCache(config=model.config)), ([2, 5, 1, 3], static)):
        found = []
        for piece in ids.split(pieces, 1):
            out = model(piece, cache=cache, use_cache=True)
            cache = out[CACHE]
            found.append(out.logits)
        near(torch.cat(found, 1), expected)
    # Prompts of 1 to kernel + 1 tokens, then one more.
    for length in range(1, 6):
        cache = model(ids[:, :length], use_cache=True)[CACHE]
        near(model(ids[:, length : length + 1], cache=cache).logits[:, 0], expected[:, length])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_is_read_as_if_alone(name):
    model, ids, kept = made(VARIANTS[name]), tokens(), mask()
    alone = [model.model.gpt(ids[row : row + 1, pads:]).logits[0] for row, pads in enumerate(PADDING)]

    def check(logits: Tensor) -> None:
        assert logits.isfinite().all()
        for row, pads in enumerate(PADDING):
            near(logits[row, pads:], alone[row])

    check(model(ids, attention_mask=kept, use_cache=False).logits)
    caches = (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12))
    for cache, pieces in zip(caches, ([2, 5, 1, 3], [9, 1, 1]), strict=True):
        found, fed = [], 0
        for piece in ids.split(pieces, 1):
            fed += piece.shape[1]
            found.append(model(piece, attention_mask=kept[:, :fed], cache=cache).logits)
        check(torch.cat(found, 1))
    # On the right nothing sees it.
    right = kept.flip(1)
    near(model(ids, attention_mask=right, use_cache=False).logits, model.model.gpt(ids).logits)


@pytest.mark.parametrize("name", ["code-tc", *NAMES[3:5]])
def test_gradients_beside_padding_are_those_of_the_rows_alone(name):
    model, ids, kept = made(VARIANTS[name]), tokens(), mask()
    parameters = list(model.parameters())
    rows = [(row, pads, randn(11 - pads, 13, seed=row)) for row, pads in enumerate(PADDING)]
    beside = model(ids, attention_mask=kept, use_cache=False).logits
    value = sum((beside[row, pads:] * cotangent).sum() for row, pads, cotangent in rows)
    alone = sum((model.model.gpt(ids[row : row + 1, pads:]).logits[0] * c).sum() for row, pads, c in rows)
    for one, two in zip(torch.autograd.grad(value, parameters), torch.autograd.grad(alone, parameters), strict=True):
        near(one, two)


def test_the_loss_is_first_shifted_and_ignores_100():
    model, ids = made(), tokens()
    labels = ids.clone()
    labels[0, 4:] = -100
    output = model(ids, labels=labels)
    logits = model.model.gpt(ids).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    near(output.loss, expected, 1e-6)
    assert output[0] is output.loss and next(iter(output)) == "loss"
    assert model(ids, labels=labels, return_dict=False)[0].equal(output.loss)
    items = model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    near(items * 7, expected * (labels[:, 1:] != -100).sum(), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper-scalar", "code-tc"])
def test_hidden_states_are_what_layers_and_head_read(name):
    model, ids = made(VARIANTS[name]), tokens()
    gpt, seen = model.model.gpt, []
    hooks = [r.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for r in gpt.residuals()[::2]]
    hooks.append(gpt.norm.register_forward_hook(lambda module, args, result: seen.append(result)))
    gpt(ids)
    for hook in hooks:
        hook.remove()
    plain = model(ids)
    for given in ({"use_cache": False}, {"use_cache": True}):
        output = model(ids, output_hidden_states=True, **given)
        assert len(output.hidden_states) == 3
        for one, two in zip(output.hidden_states, seen, strict=True):
            near(one, two)
        near(output.logits, plain.logits)
        near(model.lm_head(output.hidden_states[-1]), plain.logits)
    near(model.model(ids).last_hidden_state, seen[-1])


@torch.no_grad()
def test_other_inputs():
    model, ids = made(), tokens()
    expected = model.model.gpt(ids).logits
    near(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
    near(model(ids, position_ids=torch.arange(11)[None], use_cache=False).logits, expected)
    near(model(ids, logits_to_keep=2).logits, expected[:, -2:])
    near(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, expected[:, [0, 4]])
    shifted = model(ids, position_ids=torch.arange(11)[None] + 3).logits
    assert not torch.allclose(shifted, expected)
    eager = DeepDeltaForCausalLM.from_gpt(model.model.gpt, attn_implementation="eager")
    near(eager(ids).logits, expected)


@pytest.mark.parametrize("name", ["code-tc", *NAMES[7:8]])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    model, ids, kept = made(VARIANTS[name]), tokens(), mask()
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, attention_mask=kept, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected, counted = gradients(), []
    model.model.gpt.layers[0].register_forward_pre_hook(lambda *_: counted.append(1))
    enable = model.activation_checkpointing_enable if FIVE else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    for one, two in zip(gradients(), expected, strict=True):
        near(one, two)
    assert len(counted) == 2


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_p": 0.8, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "in pieces": {"do_sample": False, "prefill_chunk_size": 3},
}


@pytest.mark.compatible("generate: greedy, sampling, beams, left padding", "transformers")
@pytest.mark.parametrize("name", ["code-tc", *NAMES[3:7]])
@pytest.mark.parametrize("kind", GENERATIONS)
def test_generation_from_padded_prompts(name, kind):
    model, ids, kept = made(VARIANTS[name]), tokens()[:, :8], mask(8)
    options = GENERATIONS[kind] | {"max_new_tokens": 7, "pad_token_id": 0}

    def drawn(**more: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=kept, **(options | more))

    expected = drawn(use_cache=False, prefill_chunk_size=None)
    assert expected.shape[1] == 15
    assert drawn().equal(expected)
    assert drawn(cache_implementation="static").equal(expected)
    if kind == "greedy":
        alone = model.generate(ids[2:, 7:], **(options | {"max_new_tokens": 7}))
        assert alone[0, 1:].equal(expected[2, 8:])


def test_prompt_lookup_takes_tokens_back_and_changes_none():
    model, ids = made(TC), torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if not FIVE:
        with pytest.raises(UserError, match=r"transformers 4.57 cannot take tokens back from a cache of convolutions"):
            model.generate(ids, **options, prompt_lookup_num_tokens=3, eos_token_id=12)
        return
    assert model.generate(ids, **options, prompt_lookup_num_tokens=3).equal(model.generate(ids, **options))


def test_a_streamer_gets_every_token():
    class Streamer:
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    model, streamer = made(), Streamer()
    ids = model.generate(tokens(1, 4), streamer=streamer, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert streamer.ids == [*ids[0].tolist(), -1]


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

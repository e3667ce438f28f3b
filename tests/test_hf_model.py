"""The GPT as a model of transformers: numbers, caches, generation; held against the GPT itself."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from deepdelta import UserError
from deepdelta.hf import DeepDeltaForCausalLM
from deepdelta.hf.lines import CACHE, FIVE
from helpers import randn
from hf_models import NAMES, PADDING, TC, VARIANTS, made, mask, near, tokens


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

"""Sampling from a model, one token at a time."""

from collections.abc import Iterator

import torch

from deepdelta.decoding.cache import DecodingCache
from deepdelta.errors import UserError
from deepdelta.ids import Ids, id_list
from deepdelta.models.gpt import GPT


def generate(
    model: GPT,
    prompt: Ids,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Up to `tokens` ids that continue `prompt`, each drawn from softmax(logits / temperature).

    Each is drawn from the logits of the last `context` ids, at positions from 0 on. Up to the context's length they
    come one id at a time from a `DecodingCache`. Beyond it the window slides: every id then has another position, so
    the whole window is fed again for each new id, at the cost of a prefill. The weights must not change meanwhile.

    Args:
        prompt: ids, as a list, a tensor or an array of one row.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest only.
        vocab_size: ids from here on (padding of the embedding) are never drawn.

    Raises:
        UserError: an empty prompt, ids beyond the vocabulary, or a setting out of range; raised by the call, before
            the first id is asked for.
    """
    rows, ids = model.embedding.weight.shape[0], id_list(prompt, "the prompt")
    if not ids:
        raise UserError("the prompt must hold at least one token, got none.")
    if outside := [one for one in ids if not 0 <= one < rows]:
        raise UserError(f"the prompt's ids must lie in [0, {rows}), got {outside[0]}.")
    for name, value, low in (
        ("temperature", temperature, 0),
        ("tokens", tokens, 0),
        ("seed", seed, 0),
        ("top_k", 1 if top_k is None else top_k, 1),
    ):
        if not low <= value < 1 << 62:
            raise UserError(f"{name} must be at least {low}, got {value}.")

    def drawn() -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed)
        device = model.embedding.weight.device
        cache = DecodingCache(model)
        for _ in range(tokens):
            if len(ids) > cache.context:
                cache.clear()
            new = ids[-cache.context :][cache.length :]
            logits = cache.decode(torch.tensor([new], device=device))[0, -1, :vocab_size].double().cpu()
            if top_k is not None and top_k < logits.shape[0]:
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            if temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                # Less the largest, so that a small temperature gives -inf for the others and not inf for all.
                probabilities = ((logits - logits.max()) / temperature).nan_to_num(nan=0.0).softmax(-1)
                ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            yield ids[-1]

    return drawn()

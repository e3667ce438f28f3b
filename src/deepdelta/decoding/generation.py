"""Sampling from a model, one token at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepdelta.decoding.cache import DecodingCache
from deepdelta.errors import UserError
from deepdelta.ids import Ids, id_list
from deepdelta.models.gpt import GPT


@dataclass(frozen=True)
class _Draw:
    """How an id is drawn from logits."""

    temperature: float
    top_k: int | None
    top_p: float

    def __call__(self, logits: Tensor, generator: torch.Generator) -> int:
        if self.top_k is not None and self.top_k < logits.shape[0]:
            logits[logits < logits.topk(self.top_k).values[-1]] = -torch.inf
        if self.temperature == 0:
            return int(logits.argmax())
        # Less the largest, so that a small temperature gives -inf for the others and not inf for all.
        probabilities = ((logits - logits.max()) / self.temperature).nan_to_num(nan=0.0).softmax(-1)
        if self.top_p < 1:
            ordered, places = probabilities.sort(descending=True)
            before = ordered.cumsum(0) - ordered
            probabilities[places[before >= self.top_p]] = 0.0
        return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    model: GPT,
    prompt: Ids,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Up to `tokens` ids that continue `prompt`, each drawn from softmax(logits / temperature).

    Each is drawn from the logits of the last `context` ids, at positions from 0 on. Up to the context's length they
    come one id at a time from a `DecodingCache`. Beyond it the window slides: every id then has another position, so
    the whole window is fed again for each new id, at the cost of a prefill. The weights must not change meanwhile.

    Args:
        prompt: ids, as a list, a tensor or an array of one row; of several rows see `generate_batch`.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest only.
        top_p: draw among the likeliest only, as few as have together at least this probability.
        stop: ids after which nothing follows; such an id is the last that is given.
        vocab_size: ids from here on (padding of the embedding) are never drawn.

    Raises:
        UserError: an empty prompt, ids beyond the vocabulary, or a setting out of range; raised by the call, before
            the first id is asked for.
    """
    rows, draw = [_prompt(model, prompt)], _draw(tokens, temperature, top_k, top_p, seed)
    return (row[0] for row in _drawn(model, rows, tokens, draw, stop, seed, vocab_size) if row[0] is not None)


def generate_batch(
    model: GPT,
    prompts: Sequence[Ids] | Tensor | np.ndarray,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Up to `tokens` ids that continue each of several prompts, one per row in each step; None once a row has stopped.

    Row i gives what `generate` gives of its prompt alone with the seed `seed + i`. Prompts may differ in length:
    shorter ones are padded on the left, which is not seen, but takes up context.

    Args:
        prompts: rows of ids, or a tensor or an array (B, T).
        others: see `generate`.

    Raises:
        UserError: see `generate`; no prompt.
    """
    rows = [_prompt(model, prompt) for prompt in prompts]
    if not rows:
        raise UserError("prompts must hold at least one prompt, got none.")
    return _drawn(model, rows, tokens, _draw(tokens, temperature, top_k, top_p, seed), stop, seed, vocab_size)


def _prompt(model: GPT, prompt: Ids) -> list[int]:
    rows, ids = model.embedding.weight.shape[0], id_list(prompt, "the prompt")
    if not ids:
        raise UserError("the prompt must hold at least one token, got none.")
    if outside := [one for one in ids if not 0 <= one < rows]:
        raise UserError(f"the prompt's ids must lie in [0, {rows}), got {outside[0]}.")
    return ids


def _draw(tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int) -> _Draw:
    for name, value, low in (
        ("temperature", temperature, 0),
        ("tokens", tokens, 0),
        ("seed", seed, 0),
        ("top_k", 1 if top_k is None else top_k, 1),
    ):
        if not low <= value < 1 << 62:
            raise UserError(f"{name} must be at least {low}, got {value}.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], got {top_p}.")
    return _Draw(temperature, top_k, top_p)


def _drawn(
    model: GPT, rows: list[list[int]], tokens: int, draw: _Draw, stop: Sequence[int], seed: int, vocab_size: int | None
) -> Iterator[list[int | None]]:
    """One id per row and step; `rows` grow by them."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
    device, context = model.embedding.weight.device, model.config.context
    padding: list[int] | None = None
    stopped = [False] * len(rows)
    for _ in range(tokens):
        windows = [ids[-context:] for ids in rows]
        longest = max(map(len, windows))
        padded = [longest - len(window) for window in windows]
        if padding != padded:
            padding, cache = padded, DecodingCache(model, len(rows), padded)
        elif max(map(len, rows)) > context:
            cache.clear()
        new = [([0] * pads + window)[cache.length :] for pads, window in zip(padded, windows, strict=True)]
        logits = cache.decode(torch.tensor(new, device=device))[:, -1, :vocab_size].double().cpu()
        given: list[int | None] = []
        for i, ids in enumerate(rows):
            # What a row that has stopped goes on with is not looked at.
            ids.append(ids[-1] if stopped[i] else draw(logits[i], generators[i]))
            given.append(None if stopped[i] else ids[-1])
            stopped[i] = stopped[i] or ids[-1] in stop
        yield given
        if all(stopped):
            return

"""Sampling from a model, one token at a time."""

from collections.abc import Iterator, Sequence

import torch

from deepdelta.errors import UserError
from deepdelta.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Up to `tokens` ids that continue `prompt`, each drawn from softmax(logits / temperature).

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest only.
        vocab_size: ids from here on (padding of the embedding) are never drawn.

    Raises:
        UserError: an empty prompt, ids beyond the vocabulary, or a setting out of range.
    """
    rows = model.embedding.weight.shape[0]
    if not prompt:
        raise UserError("the prompt must hold at least one token, got none.")
    if min(prompt) < 0 or max(prompt) >= rows:
        raise UserError(f"the prompt's ids must lie in [0, {rows}), got {max(prompt)}.")
    if temperature < 0:
        raise UserError(f"temperature must be at least 0, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}.")
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    ids = list(prompt)
    for _ in range(tokens):
        window = torch.tensor([ids[-model.config.context :]], device=device)
        logits = model(window).logits[0, -1, :vocab_size].double().cpu()
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            if top_k is not None and top_k < logits.shape[0]:
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            probabilities = (logits / temperature).softmax(-1)
            ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        yield ids[-1]

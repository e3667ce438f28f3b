"""Loss over a split of the corpus."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from deepdelta.data import IGNORED, Corpus, spread, window_count, windows
from deepdelta.errors import UserError
from deepdelta.limits import check_memory
from deepdelta.models import LanguageModel, logits_at_once
from deepdelta.models.gpt import applications
from deepdelta.training.ranks import ALONE, Ranks


def contexts(context: int, split: int, tokens: int | None) -> str:
    """How `evaluate` cuts contexts out of a split of so many tokens, in plain English."""
    if _whole(context, split, tokens):
        return f"consecutive windows of {context} tokens without overlap"
    return f"windows of {context} tokens without overlap, evenly spread"


def _whole(context: int, split: int, tokens: int | None) -> bool:
    return tokens is None or tokens >= split - 1 or split <= context


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy over the evaluated tokens."""

    loss: float
    """Nats per token."""
    tokens: int
    """How many tokens were predicted."""
    how: str
    """How the contexts were cut."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def bits_per_byte(self, byte_count: int) -> float:
        """Bits per byte of text, for `byte_count` bytes behind the evaluated tokens."""
        return self.loss * self.tokens / math.log(2) / byte_count


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    corpus: Corpus,
    *,
    batch_size: int,
    device: torch.device,
    autocast: bool = False,
    tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    repeats: int | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """The model's loss on the validation split, or on about `tokens` of its tokens.

    Contexts are windows of the model's context length that do not overlap: consecutive ones, so that every token but
    the very first is predicted exactly once, or for fewer tokens whole ones evenly spread over the split. Tokens at the
    start of a window are predicted with little context. Sums are kept in fp64. Of several ranks each takes its rows of
    every batch.

    Args:
        repeats: of a looped GPT, another number of repetitions than its configuration's.

    Raises:
        UserError: a batch_size below 1, or one past memory; repeats of a model that is not looped, or below 1; the
            corpus has changed since it was loaded.
    """
    # Also what is no GPT of ours is evaluated, if it is called as one.
    options = {} if repeats is None else {"repeats": applications(model.config, repeats)}
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")
    context = model.config.context
    split = corpus.validation
    if len(split) < 2:
        raise UserError(f"the validation split must hold at least 2 tokens to predict one, got {len(split)}.")
    vocabulary, width = model.embedding.weight.shape
    rows = min(batch_size, window_count(split, context=context)) * context
    least = 8 * logits_at_once(rows, vocabulary) + 2 * rows * width
    check_memory(least, "the logits of a batch and their logarithms (batch_size times context)", device)
    total, count = 0.0, 0
    corpus.check_mapped()
    if tokens is None or _whole(context, len(split), tokens):
        number, pairs = window_count(split, context=context), windows(split, context=context, batch_size=batch_size)
    else:
        chosen = spread(split, context=context, limit=tokens)
        number, pairs = len(chosen), ((part[:, :-1], part[:, 1:]) for part in torch.split(chosen, batch_size))
    batches = -(-number // batch_size)
    was_training = model.training
    model.eval()
    for index, (every, every_label) in enumerate(pairs):
        inputs, labels = ranks.rows(every).to(device), ranks.rows(every_label).to(device)
        if not len(inputs):  # the ranks call a sharded model equally often
            inputs, labels = every[:1].to(device), torch.full_like(every_label[:1], IGNORED, device=device)
        counted = int((labels != -1).sum())
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            if logits_at_once(labels.numel(), vocabulary) < labels.numel() * vocabulary:
                total += model(inputs, labels, loss_alone=True, **options).loss.double().item() * counted
            else:
                logits = model(inputs, **options).logits
                losses = F.cross_entropy(
                    logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-1, reduction="none"
                )
                total += losses.double().sum().item()
        count += counted
        corpus.check_mapped()  # before the next windows are read
        if progress is not None:
            progress(index + 1, batches)
    corpus.check_unchanged()
    model.train(was_training)
    if ranks.sharing > 1:
        total, predicted = ranks.summed(torch.tensor([total, count], dtype=torch.float64)).tolist()
        count = round(predicted)
    return Evaluation(total / count, count, contexts(context, len(split), tokens))

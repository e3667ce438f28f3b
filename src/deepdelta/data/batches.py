"""Windows of a split as tensors: random ones for training, all of it for evaluation.

Shapes: B batch, T context.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int64, UInt
from numpy.random import Philox
from torch import Tensor

IGNORED = -1  # the label of a position that predicts nothing


def batch(
    tokens: UInt[np.ndarray, " tokens"],
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    ends_at: int | None = None,
    mixture: Sequence[tuple[UInt[np.ndarray, " _"], float]] = (),
) -> tuple[Int64[Tensor, "batch context"], Int64[Tensor, "batch context"]]:
    """Inputs and labels of one training step: `batch_size` windows at random positions.

    Each window is `context` + 1 successive tokens from anywhere in the split, whether or not documents end in it;
    inputs are all but the last, labels all but the first. Positions are uniform over all windows, drawn with
    replacement.

    The result is a pure function of the tokens and (seed, step): position i of the batch is the i-th number of the
    counter-based generator Philox 4x64 with key (seed, step), modulo the number of windows. No state exists to save or
    restore, and steps never share numbers. Of several processes each takes its rows of the one batch.

    Args:
        tokens: the ids of a split, more than `context` of them (see `check_context`).
        seed, step: 0 or more, below 2^64.
        ends_at: the separator of documents. What follows the first one in a window's labels has the label -1
            (`IGNORED`): it would have another document before it. A window may begin with one.
        mixture: ids and their weights, which add up to 1, in place of `tokens`: number 2i, as a fraction of 2^64,
            says which of them position i is taken from, number 2i + 1 where.
    """
    assert len(tokens) > context, "check_context comes first"
    generator = Philox(key=np.array([seed, step], np.uint64))
    if mixture:
        which, numbers = np.atleast_1d(generator.random_raw(2 * batch_size)).reshape(batch_size, 2).T
        bounds = np.cumsum([weight for _, weight in mixture])[:-1]
        sources = [mixture[at][0] for at in np.searchsorted(bounds, which * 2.0**-64, side="right")]
    else:
        numbers, sources = np.atleast_1d(generator.random_raw(batch_size)), [tokens] * batch_size
    starts = [int(number) % (len(source) - context) for number, source in zip(numbers, sources, strict=True)]
    cut = [source[start : start + context + 1] for source, start in zip(sources, starts, strict=True)]
    windows_BT1 = np.stack([window.astype(np.int64) for window in cut])
    inputs, labels = _inputs_and_labels(windows_BT1)
    if ends_at is not None:
        ends = labels == ends_at
        labels[ends.cumsum(1) - ends.long() > 0] = IGNORED
    return inputs, labels


def windows(
    tokens: UInt[np.ndarray, " tokens"], *, context: int, batch_size: int
) -> Iterator[tuple[Int64[Tensor, "batch context"], Int64[Tensor, "batch context"]]]:
    """The whole split once, for evaluation, in batches of at most `batch_size` windows.

    Window i has the inputs iT ... iT + T - 1 and the labels one position on, T being the context: windows touch and do
    not overlap, and every token but the very first is predicted exactly once, with 1 to T tokens before it. The last
    window is filled up with input 0 and label -1 (`IGNORED`).
    """
    count = window_count(tokens, context=context)
    for first in range(0, count, batch_size):
        rows = min(batch_size, count - first)
        span = tokens[first * context : (first + rows) * context + 1].astype(np.int64)
        inputs = np.zeros(rows * context, np.int64)
        labels = np.full(rows * context, IGNORED, np.int64)
        inputs[: len(span) - 1] = span[:-1]
        labels[: len(span) - 1] = span[1:]
        yield torch.from_numpy(inputs).view(rows, context), torch.from_numpy(labels).view(rows, context)


def spread(tokens: UInt[np.ndarray, " tokens"], *, context: int, limit: int) -> Int64[Tensor, "windows context1"]:
    """Whole windows of `context` inputs and the label after the last, evenly spread over a split, about `limit` tokens.

    Of the W windows that `windows` cuts whole, n = limit / context, at least one and at most W: number i starts at
    token floor(i W / n) context. Inputs do not overlap.

    Args:
        tokens: the ids of a split, more than `context` of them (see `check_context`).
    """
    there = (len(tokens) - 1) // context
    count = min(max(1, limit // context), there)
    starts = [i * there // count * context for i in range(count)]
    return torch.from_numpy(np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64))


def window_count(tokens: UInt[np.ndarray, " tokens"], *, context: int) -> int:
    """How many windows `windows` yields: (tokens - 1) / context, rounded up."""
    return -(-max(len(tokens) - 1, 0) // context)


def _inputs_and_labels(
    windows_BT1: np.ndarray,
) -> tuple[Int64[Tensor, "batch context"], Int64[Tensor, "batch context"]]:
    both = torch.from_numpy(windows_BT1)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()

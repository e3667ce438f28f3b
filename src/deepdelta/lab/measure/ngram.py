"""The loss of counted n-grams, which a table of networks holds too: something trivial to compare with."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from deepdelta.errors import UserError


class _Order(NamedTuple):
    """Counts of one length of context: sorted keys of contexts with how often and with how many kinds of next token
    they came, sorted keys of whole n-grams with how often."""

    contexts: np.ndarray
    total: np.ndarray
    kinds: np.ndarray
    grams: np.ndarray
    often: np.ndarray


class WittenBell:
    """n-grams with Witten-Bell smoothing, counted within windows as a network sees them.

    P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h)) with c the counts, T(h) the number of different tokens that
    came after h and h' = h without its oldest token; P(w | h') where h never came; 1 / vocabulary below no context
    (Witten and Bell 1991; interpolated, as Chen and Goodman 1998).
    """

    def __init__(self, windows_N: Iterable[Integer[np.ndarray, " tokens"]], *, order: int, vocabulary: int) -> None:
        """Count.

        Args:
            windows_N: stretches of successive ids; no n-gram reaches over an end.
            order: n, the length of the longest n-gram, 1 or more.

        Raises:
            UserError: an n-gram does not fit into 63 bits.
        """
        if vocabulary**order >= 1 << 63:
            raise UserError(
                f"{order}-grams of {vocabulary:,} ids do not fit into 63 bits; at most "
                f"{int(63 / np.log2(vocabulary))} ids in a row do."
            )
        self.order, self.vocabulary = order, vocabulary
        windows = [np.asarray(window, np.int64) for window in windows_N]
        self._orders = [self._count(windows, length) for length in range(order)]

    def _count(self, windows: list[np.ndarray], length: int) -> _Order:
        keys = [self._keys(window, length) for window in windows if len(window) > length]
        grams, count = np.unique(np.concatenate([np.empty(0, np.int64), *keys]), return_counts=True)
        contexts, first = np.unique(grams // self.vocabulary, return_index=True)
        edges = np.append(first, len(grams)).astype(np.int64)
        total = np.add.reduceat(count, first) if len(first) else np.empty(0, np.int64)
        return _Order(contexts, total, np.diff(edges), grams, count)

    def _keys(self, window: np.ndarray, length: int) -> np.ndarray:
        """A number for each n-gram of `length` + 1 ids: its digits in base `vocabulary`, the newest last."""
        key = np.zeros(len(window) - length, np.int64)
        for offset in range(length + 1):
            key = key * self.vocabulary + window[offset : len(window) - length + offset]
        return key

    def probabilities(self, window_N: Integer[np.ndarray, " tokens"]) -> np.ndarray:
        """P of every id of a window but its first, given those before it in the window, the last order - 1 at most."""
        window = np.asarray(window_N, np.int64)
        found = np.full(len(window), 1 / self.vocabulary)
        for length, counted in enumerate(self._orders):
            if len(window) <= length:
                break
            keys, low = self._keys(window, length), found[length:]
            total, kinds = (
                _looked_up(counted.contexts, own, keys // self.vocabulary) for own in (counted.total, counted.kinds)
            )
            count = _looked_up(counted.grams, counted.often, keys)
            found[length:] = np.where(total > 0, (count + kinds * low) / np.maximum(total + kinds, 1), low)
        return found[1:]

    def loss(self, windows_N: Iterable[Integer[np.ndarray, " tokens"]]) -> float:
        """Mean of -ln P over every id of the windows but the first of each, in nats per token."""
        logs = np.concatenate([np.log(self.probabilities(window)) for window in windows_N])
        return float(-logs.mean())


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)

"""What transformers' caches keep of a deepdelta model: keys and values, and the last inputs of its convolutions.

Importing this makes `DynamicCache(config=...)` and `StaticCache(config=..., max_cache_len=...)` of a `DeepDeltaConfig`
have such layers.

Shapes: B batch, T new tokens, K taps; `...` what a convolution over tokens takes per token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from deepdelta.errors import UserError
from deepdelta.hf.lines import FIVE

LAYER_TYPE = "deepdelta"


class Histories(CacheLayerMixin):
    """The last K - 1 inputs of every convolution over tokens in a layer, by name; zeros stand before the first."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.histories: dict[str, Tensor] = {}
        self.before: dict[str, int] = {}
        """K - 1 of each."""
        self.record_past = False
        """Whether older inputs stay until `crop`, which may then go back to them."""

    def recall(self, name: str, new: Tensor, before: int) -> Tensor:
        """The K - 1 inputs before the new ones (B, T, ...) and these, (B, K - 1 + T, ...); the last are kept."""
        known = self.histories.get(name)
        if known is None:
            known = new.new_zeros(new.shape[0], before, *new.shape[2:])
        self.before[name] = before
        self.histories[name] = window = torch.cat((known, new), 1)
        if not self.record_past:
            self._shorten(name)
        return window[:, window.shape[1] - before - new.shape[1] :]

    def _shorten(self, name: str, dropped: int = 0) -> None:
        last = self.histories[name].shape[1] - dropped
        # A copy: a view would keep the whole window alive.
        self.histories[name] = self.histories[name][:, last - self.before[name] : last].clone()

    def _each(self, change: Any) -> None:
        self.histories = {name: change(history) for name, history in self.histories.items()}

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        if self.histories and not FIVE:
            raise UserError(
                "transformers 4.57 cannot take tokens back from a cache of convolutions (assisted generation, prompt "
                "lookup); take 5.24."
            )
        if tokens_to_remove and self.histories and not self.record_past:
            raise UserError("to take tokens back, a cache has to keep more of them: activate_past_recording() first.")
        super().crop(tokens_to_remove)
        for name in self.histories:
            self._shorten(name, abs(tokens_to_remove))

    def reset(self) -> None:
        super().reset()
        self.histories = {}

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda history: history.index_select(0, beam_idx.to(history.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda history: history.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda history: history[indices])

    def offload(self) -> None:
        super().offload()
        self._each(lambda history: history.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        if self.keys is not None:
            self._each(lambda history: history.to(self.keys.device, non_blocking=True))


class DynamicDeltaLayer(Histories, DynamicLayer):
    """Keys and values that grow, and histories."""

    _layer_type = LAYER_TYPE


class StaticDeltaLayer(Histories, StaticLayer):
    """Keys and values in place from the start, and histories."""

    _layer_type = LAYER_TYPE
    is_compileable = False


def remembering(cache: Cache, layers: int) -> Cache:
    """The cache itself, with layers that keep histories where it is new and transformers 4.57, which knows two kinds of
    layers alone, has made them."""
    held = getattr(cache, "layers", [])
    if FIVE or cache.get_seq_length() or any(isinstance(layer, Histories) for layer in held):
        return cache
    sizes = {"max_cache_len": held[0].max_cache_len} if held and isinstance(held[0], StaticLayer) else {}
    cache.layers = [StaticDeltaLayer(**sizes) if sizes else DynamicDeltaLayer() for _ in range(layers)]
    cache.layer_class_to_replicate = None
    return cache

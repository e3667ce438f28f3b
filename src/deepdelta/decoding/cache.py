"""Cached decoding of a GPT: what later tokens need of earlier ones is kept, and nothing else.

Shapes: B batch, T new tokens, V value channels, D model width, H heads, E width of a head, K taps.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.decoding.history import FoldedTokens, History, Remembering
from deepdelta.decoding.step import one_token_map
from deepdelta.errors import UserError
from deepdelta.ids import Ids, id_list
from deepdelta.models.attention import KeyValues, Slots
from deepdelta.models.gpt import GPT, Given
from deepdelta.nn.parts.compression import ChannelCompression, ChannelConvolution, TokenConvolution
from deepdelta.nn.parts.expansion import EmbeddingConvolution
from deepdelta.nn.plain import plain
from deepdelta.nn.residual import DeltaResidual


class CacheMemory(NamedTuple):
    """What a cache holds, in bytes."""

    keys_values: int
    """2 depth B H context E numbers, as in a model without value channels."""
    histories: int
    """B (K - 1) D numbers for an embedding convolution, B (K - 1) V D for each of 2 depth + 1 token compressions."""
    folded_weights: int
    """V D numbers per distinct compression along value channels, V D K per one over tokens."""


class DecodingCache:
    """A model with the memory of the tokens it was fed: `decode` continues where the last call ended.

        cache = DecodingCache(model)
        logits = cache.decode(prompt)[:, -1]  # the whole prompt at once, or in pieces
        logits = cache.decode(next_token)[:, -1]  # one at a time, or several

    Kept are the keys and values of every layer, of a looped GPT in every repetition, preallocated for the model's
    context, and the last K - 1 inputs of every convolution over tokens: the embeddings for an embedding convolution,
    and for token compression the states before each of the 2 depth + 1 readings (also where two sublayers share one
    compression: their states differ).
    Of the state X of an earlier token nothing else is kept.

    The compressions' weights are folded when the cache is made: make a new cache after the model's weights, dtype,
    device or modules (hooks, adapters) change.

    Args:
        model: used as it is. One token at a time is fastest with the backend 'fused', chosen before the cache is made.
        batch: B, the rows that every call brings.
        padding: how many ids at the start of each row are padding, for prompts of different lengths; they may be any
            ids of the vocabulary. A row's tokens are seen as without padding: positions count from its first real
            token, and neither attention nor a convolution sees its padding. Padding takes up context. The logits at
            padding mean nothing.

    Raises:
        UserError: batch or padding out of range; sharded parameters; layers without delta residuals of the library.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, batch: int = 1, padding: Ids | None = None) -> None:
        self.model, self.batch, self.context = model, batch, model.config.context
        if batch < 1:
            raise UserError(f"batch must be at least 1, got {batch}.")
        padding = None if padding is None else id_list(padding, "padding")
        if padding is not None and (len(padding) != batch or not 0 <= min(padding) <= max(padding) < self.context):
            raise UserError(
                f"padding must be {batch} numbers, one per row, in [0, {self.context - 1}] (context {self.context}), "
                f"got {padding}."
            )
        _refuse_changed(model)
        self.length = 0
        """Ids fed so far, padding included."""
        weight, config = model.embedding.weight, model.config
        self._padding_B = torch.tensor(padding, device=weight.device) if padding and any(padding) else None
        memory = (batch, config.heads, self.context, config.head_width)
        self.layers = [KeyValues(weight.new_zeros(memory), weight.new_zeros(memory)) for _ in range(config.depth)]
        self.expansion_history: History | None = None
        """The last embeddings, (B, K - 1, D), for an embedding convolution."""
        residual = config.residual
        if residual.expansion == "embedding_conv":
            self.expansion_history = self._history(residual.expansion_kernel, config.dim)
        self.compression_histories: list[History] = []
        """For token compression the last states before every sublayer and before the readout, (B, K - 1, V, D)."""
        self._folded: dict[nn.Module, Tensor] = {}
        residuals = model.residuals(repeated=True)
        maps = [*(one.input_map() for one in residuals), model.head()]
        self._input_maps = [replace(one, compression=self._decoding(one.compression)) for one in maps]
        first, *others = self._input_maps
        pairs = zip(residuals, others, strict=True)
        self._one_token_maps = [first, *(one_token_map(*pair, batch, weight.device, weight.dtype) for pair in pairs)]

    @torch.no_grad()
    def decode(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T vocabulary"]:
        """The logits of new tokens, which the cache then holds; without gradients.

        Raises:
            UserError: another number of rows than the cache's, no ids, or more than the context still has room for.
        """
        batch, tokens = input_ids.shape
        if batch != self.batch or tokens == 0:
            raise UserError(
                f"this cache decodes ids of shape ({self.batch}, T) with T at least 1, got {tuple(input_ids.shape)}."
            )
        if self.length + tokens > self.context:
            raise UserError(
                f"the model's context is {self.context} tokens, of which the cache holds {self.length}: {tokens} more "
                "do not fit; call clear() and feed the last ones again."
            )
        slots = self._slots(tokens)
        extend = None if self.expansion_history is None else self.expansion_history.extend
        *maps, head = self._one_token_maps if tokens == 1 else self._input_maps
        given: list[Given] = []
        for layer, first, second in zip(self.layers, maps[::2], maps[1::2], strict=True):
            given.append(((partial(layer.extend, self.length), slots), {"attention": first, "mlp": second}))
        c_BTD = self.model.read(self.model.embedding(input_ids), given, head, extend)
        self.length += tokens
        return F.linear(c_BTD, self.model.embedding.weight)

    def clear(self) -> None:
        """Forget every token; padding stands for the next ones."""
        self.length = 0
        for history in self._histories():
            history.clear()

    def memory(self) -> CacheMemory:
        return CacheMemory(
            sum(tensor.nbytes for layer in self.layers for tensor in layer),
            sum(history.values.nbytes for history in self._histories()),
            sum(weight.nbytes for weight in self._folded.values()),
        )

    def _slots(self, tokens: int) -> Slots:
        first, last, rotary = self.length, self.length + tokens, self.model.rotary
        device = self.model.embedding.weight.device
        if self._padding_B is None and (first == 0 or tokens == 1):
            return Slots(rotary.at(slice(first, last), device), None)
        slots_L = torch.arange(last, device=device)
        visible_TL = slots_L <= slots_L[first:, None]
        if self._padding_B is None:
            return Slots(rotary.at(slice(first, last), device), visible_TL[None, None])
        padding_B1 = self._padding_B[:, None]
        own_TL = slots_L == slots_L[first:, None]
        # Padding attends to itself, so that its numbers stay finite.
        visible_BTL = visible_TL & (slots_L >= padding_B1)[:, None] | own_TL
        positions_BT = (slots_L[first:] - padding_B1).clamp(min=0)
        return Slots(rotary.at(positions_BT, device), visible_BTL[:, None])

    def _history(self, taps: int, *shape: int) -> History:
        return History(self.model.embedding.weight.new_zeros(self.batch, taps - 1, *shape), self._padding_B)

    def _histories(self) -> list[History]:
        first = [] if self.expansion_history is None else [self.expansion_history]
        return first + self.compression_histories

    def _decoding(self, compression: nn.Module) -> nn.Module:
        """The compression with its weights folded, and with a history where it works over tokens; one that is not
        plainly ours as it is."""
        token = self.model.config.residual.compression == "token"
        if not plain(compression, ChannelCompression, ChannelConvolution, TokenConvolution):
            return Remembering(compression, self._token_history()) if token else compression
        assert isinstance(compression, ChannelCompression | ChannelConvolution | TokenConvolution)
        if compression not in self._folded:
            self._folded[compression] = compression.folded().detach().clone()
        weight = self._folded[compression]
        if isinstance(compression, TokenConvolution):
            return FoldedTokens(weight, self._token_history())
        with torch.device("meta"):
            folded = ChannelCompression(self.model.config.residual, weight.shape[-1])
        folded.weight = nn.Parameter(weight, requires_grad=False)
        return folded

    def _token_history(self) -> History:
        config = self.model.config
        channels, taps = config.residual.value_channels, config.residual.compression_kernel
        self.compression_histories.append(self._history(taps, channels, config.dim))
        return self.compression_histories[-1]


def _refuse_changed(model: GPT) -> None:
    """Raise UserError for a model whose parts cached decoding cannot call one token at a time."""
    # By what a DTensor has: importing its class takes longer than most models take to decode.
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise UserError(
            "cached decoding needs whole parameters, and these are sharded: load their full state dict into a "
            "deepdelta.GPT of the same config."
        )
    token = model.config.residual.compression == "token"
    needed: list[tuple[str, nn.Module | None, type[nn.Module]]] = []
    for i, layer in enumerate(model.layers):
        for name in ("attention", "mlp"):
            residual = getattr(layer, name, None)
            needed.append((f"layers.{i}.{name}", residual, DeltaResidual))
            if token and isinstance(residual, DeltaResidual):
                needed.append((f"the compression of layers.{i}.{name}", residual.compression_part(), TokenConvolution))
    if token:
        needed.append(("stream.readout", model.stream.readout, TokenConvolution))
    if model.config.residual.expansion == "embedding_conv":
        needed.append(("stream.expansion", model.stream.expansion, EmbeddingConvolution))
    for place, module, kind in needed:
        if not isinstance(module, kind):
            raise UserError(
                f"cached decoding needs a {kind.__name__} as {place}, got {type(module).__name__}; call the model on "
                "the whole text for each token instead."
            )

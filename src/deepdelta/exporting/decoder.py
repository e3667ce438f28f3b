"""A GPT as one function from new ids and what is kept of earlier ones to logits: what other runtimes can hold.

Shapes: B batch, T new tokens, P earlier tokens, V value channels, D model width, H heads, E width of a head, K taps.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config
from torch.nn import functional as F

from deepdelta.decoding.history import History, Remembering
from deepdelta.models import GPT
from deepdelta.models.attention import Slots
from deepdelta.nn.input_map import InputMap

Kept = dict[str, Tensor]
MASK, EXPANSION = "mask", "expansion"


class Window(History):
    """The K - 1 inputs before the new ones, as they are given; those for the next call are in `values`."""

    def __init__(self, values: Tensor, kept_BT: Tensor) -> None:
        super().__init__(values)
        self.kept_BT = kept_BT

    def extend(self, new: Tensor) -> Tensor:
        seen_BT = self.kept_BT.view(*self.kept_BT.shape, *[1] * (new.ndim - 2))
        window = torch.cat((self.values, new.masked_fill(~seen_BT, 0.0)), 1)
        self.values = window[:, window.shape[1] - self.values.shape[1] :].clone()
        return window


class Decoder(nn.Module):
    """Prefill and cached decoding in one function without a state of its own.

        decoder = Decoder(model)
        logits, kept = decoder(prompts, attention_mask, decoder.nothing(batch=2))
        logits, kept = decoder(next_ids, torch.ones(2, 1, dtype=torch.int64), kept)

    `kept` holds tensors by name, each with the batch in front: `mask` (B, P); per layer, of a looped GPT in every
    repetition, `layers.0.key` and `layers.0.value` (B, H, P, E); where there are convolutions over tokens their last
    inputs, `expansion` (B, K - 1, D) and `compressions.0` and so on (B, K - 1, V, D).
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        residual = model.config.residual
        self.expands, self.compresses = residual.expansion == "embedding_conv", residual.compression == "token"

    def nothing(self, batch: int) -> Kept:
        """What is kept before the first token."""
        config, zeros = self.model.config, self.model.embedding.weight.new_zeros
        residual, kept = config.residual, {MASK: zeros(batch, 0, dtype=torch.int64)}
        for i in range(config.depth):
            for name in ("key", "value"):
                kept[f"layers.{i}.{name}"] = zeros(batch, config.heads, 0, config.head_width)
        if self.expands:
            kept[EXPANSION] = zeros(batch, residual.expansion_kernel - 1, config.dim)
        for i in range(2 * config.depth + 1 if self.compresses else 0):
            size = residual.compression_kernel - 1, residual.value_channels, config.dim
            kept[f"compressions.{i}"] = zeros(batch, *size)
        return kept

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], kept: Kept
    ) -> tuple[Float[Tensor, "B T vocabulary"], Kept]:
        """Logits of the new ids, and what is kept then.

        Args:
            attention_mask: 1 for tokens, 0 for padding, which nothing sees and positions do not count. The logits at
                padding mean nothing.
            kept: `nothing(batch)`, or what the last call gave.
        """
        model, residuals = self.model, self.model.residuals(repeated=True)
        after = {MASK: torch.cat((kept[MASK], attention_mask), 1)}
        slots = self._slots(attention_mask, kept[MASK], after[MASK].bool())
        seen_BT = attention_mask.bool()
        windows = {
            name: Window(value, seen_BT) for name, value in kept.items() if name.startswith((EXPANSION, "compressions"))
        }

        def remember(layer: int, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
            pair = []
            for name, new in ((f"layers.{layer}.key", k_BHTE), (f"layers.{layer}.value", v_BHTE)):
                after[name] = torch.cat((kept[name], new), 2)
                pair.append(after[name])
            return pair[0], pair[1]

        def reading(place: int, own: InputMap) -> InputMap:
            if not self.compresses:
                return own
            return replace(own, compression=Remembering(own.compression, windows[f"compressions.{place}"]))

        maps = [reading(i, one.input_map()) for i, one in enumerate(residuals)]
        given = [
            ((partial(remember, i), slots), {"attention": maps[2 * i], "mlp": maps[2 * i + 1]})
            for i in range(model.config.depth)
        ]
        extend = windows[EXPANSION].extend if self.expands else None
        c_BTD = model.read(model.embedding(input_ids), given, reading(len(residuals), model.head()), extend)
        after |= {name: window.values for name, window in windows.items()}
        return F.linear(c_BTD, model.embedding.weight), {name: after[name] for name in kept}

    def _slots(self, mask_BT: Tensor, before_BP: Tensor, mask_BL: Tensor) -> Slots:
        new, earlier = mask_BT.shape[1], before_BP.shape[1]
        positions_BT = (before_BP.sum(1, keepdim=True) + mask_BT.cumsum(1) - 1).clamp(min=0)
        own_T1 = torch.arange(new, device=mask_BT.device)[:, None] + earlier
        keys_L = torch.arange(earlier + new, device=mask_BT.device)
        # Padding attends to itself, so that its numbers stay finite.
        visible_BTL = (keys_L <= own_T1)[None] & mask_BL[:, None] | (keys_L == own_T1)
        return Slots(self.model.rotary.at(positions_BT, mask_BT.device), visible_BTL[:, None])


def example(decoder: Decoder) -> tuple[Tensor, Tensor, Kept]:
    """Arguments in which no two sizes that may differ are equal, and none is 0 or 1."""
    batch, earlier, new = 2, 3, 4
    device, kept = decoder.model.embedding.weight.device, decoder.nothing(batch)
    ones = partial(torch.ones, dtype=torch.int64, device=device)
    longer: dict[str, tuple[int, ...]] = {MASK: (batch, earlier)}
    for name, value in kept.items():
        if name.startswith("layers"):
            longer[name] = (batch, value.shape[1], earlier, value.shape[3])
    kept |= {name: kept[name].new_ones(shape) for name, shape in longer.items()}
    return ones(batch, new), ones(batch, new), kept


def exported_program(model: GPT) -> ExportedProgram:
    """`Decoder(model)` by torch.export: any batch, any number of new and of earlier tokens, in plain PyTorch.

    One program for prefill, with nothing kept, and for decoding. Numbers, devices and dtypes are the model's.
    """
    decoder = Decoder(model).eval()
    arguments = example(decoder)
    batch, new, earlier = Dim("batch", min=1), Dim("new", min=1), Dim("earlier", min=0)
    sizes: dict[str, dict[int, object]] = {name: {0: batch} for name in arguments[2]}
    for name, axes in sizes.items():
        if name == MASK or name.startswith("layers"):
            axes[1 if name == MASK else 2] = earlier
    shapes = ({0: batch, 1: new}, {0: batch, 1: new}, sizes)
    # Else programs are made for sizes other than 0 and 1 alone.
    with _config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        return torch.export.export(decoder, arguments, dynamic_shapes=shapes)

"""nn.TransformerEncoder and nn.TransformerEncoderLayer, pre-norm and post-norm.

torch computes a whole layer in one kernel in evaluation mode, residual additions included; the delta version of the
layer never does, and the encoder no longer makes nested tensors for that kernel. Post-norm acts on each value channel.
"""

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.errors import UserError
from deepdelta.retrofitting.blocks import DeltaBlock, Deltas, Job, check_blocks


class EncoderBlock(DeltaBlock):
    """An encoder layer with delta residuals around self-attention and feed-forward."""

    RESIDUALS = ("attention", "feed_forward")

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            raise UserError("a retrofitted encoder layer takes padded tensors, got a nested one.")
        layer = cast(nn.TransformerEncoderLayer, self)
        floating = F._none_or_dtype(src_mask)
        padding = F._canonical_mask(src_key_padding_mask, "src_key_padding_mask", floating, "src_mask", src.dtype)
        mask = F._canonical_mask(src_mask, "src_mask", None, "", src.dtype, False)
        state, first = self.delta.enter(src), layer.norm_first
        norms = (layer.norm1, layer.norm2) if first else (None, None)
        attention, feed_forward = (self.delta.reading(*one) for one in zip(self.RESIDUALS, norms, strict=True))
        opening = self.delta.open("attention", state, attention)
        h = layer._sa_block(opening.c() if first else opening.x_in(), mask, padding, is_causal)
        onward = opening.onward(h, feed_forward) if first else layer.norm1(opening.rewrite(h))
        opening = self.delta.open("feed_forward", onward, feed_forward)
        state = opening.rewrite(layer._ff_block(opening.c() if first else opening.x_in()))
        return self.delta.leave(state if first else layer.norm2(state))


BLOCKS: dict[str, type[DeltaBlock]] = {"torch.nn.modules.transformer.TransformerEncoderLayer": EncoderBlock}


def retrofit_encoder(encoder: nn.Module, job: Job) -> None:
    """Convert every layer of an nn.TransformerEncoder, one state through all of them."""
    layers = list(cast(nn.ModuleList, encoder.layers))
    _retrofit(encoder, layers, job)
    job.change(encoder, "use_nested_tensor", False)
    job.hook(encoder.register_forward_hook(refuse_open_state, with_kwargs=True))


def refuse_open_state(encoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
    """Forward hook: the state begins in the first layer and ends in the last, so both must have run.

    Raises:
        UserError: one has not.
    """
    if output.ndim != (args[0] if args else kwargs["src"]).ndim:
        raise UserError(
            f"a retrofitted {type(encoder).__name__} must run its first layer and its last, which begin and end the "
            "state, and one of them is gone; undo_retrofit before you take layers out."
        )


def retrofit_layer(layer: nn.Module, job: Job) -> None:
    """Convert a layer that stands outside of an nn.TransformerEncoder: its state begins and ends in it."""
    _retrofit(layer, [layer], job)


def _retrofit(owner: nn.Module, layers: list[nn.Module], job: Job) -> None:
    check_blocks(owner, layers, BLOCKS)
    stream = job.stream(layers[0].get_submodule("self_attn").embed_dim)  # type: ignore[arg-type]
    for i, layer in enumerate(layers):
        deltas = Deltas(
            {name: stream.wrap() for name in EncoderBlock.RESIDUALS},
            entry=stream if i == 0 else None,
            stream=stream if i == len(layers) - 1 else None,
        )
        job.convert(layer, EncoderBlock, deltas)

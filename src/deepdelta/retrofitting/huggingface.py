"""Llama, Qwen3, GPT-2 and ViT of the library transformers, which is never imported here.

The models hand hidden states from block to block untouched, so these are the state (B, T, V, D) from the first block's
end to the last block's beginning. Each block's own norm stands between its reading of the state and its branch; the
gate sees what the branch sees.
"""

import sys
from typing import Any

from torch import Tensor, nn

from deepdelta.errors import UserError
from deepdelta.retrofitting.blocks import DeltaBlock, Deltas, Job, Remade, check_blocks, full_name

OLDEST = (5, 24)
"""The release of transformers whose blocks these forwards were written after."""


PLAIN_AXES = 3
"""Hidden states are (B, T, D), a state is (B, T, V, D)."""
NOT_PLAIN = "a retrofit by deepdelta: load the plain model, then what save_retrofit wrote with deepdelta.load_retrofit"
"""Stands for the number of layers in `config.json`: transformers 5 names it when it refuses it."""


class LlamaBlock(DeltaBlock):
    """A decoder layer of Llama or Qwen3 with delta residuals around attention and MLP."""

    RESIDUALS = ("attention", "mlp")
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        state = self.delta.enter(hidden_states)
        c, rewrite = self.delta.open("attention", state, self.input_layernorm)
        state = rewrite(self.self_attn(hidden_states=c, attention_mask=attention_mask, **kwargs)[0])
        c, rewrite = self.delta.open("mlp", state, self.post_attention_layernorm)
        return self.delta.leave(rewrite(self.mlp(c)))


class GPT2Block(DeltaBlock):
    """A block of GPT-2 with delta residuals around attention, cross-attention where there is one, and MLP."""

    RESIDUALS = ("attention", "cross_attention", "mlp")
    attn: nn.Module
    crossattention: nn.Module
    mlp: nn.Module
    ln_1: nn.Module
    ln_cross_attn: nn.Module
    ln_2: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        own = {"cache": cache, "attention_mask": attention_mask}
        state = self.delta.enter(hidden_states)
        c, rewrite = self.delta.open("attention", state, self.ln_1)
        state = rewrite(self.attn(c, **own, use_cache=use_cache, **kwargs)[0])
        if encoder_hidden_states is not None:
            if not hasattr(self, "crossattention"):
                raise UserError("encoder_hidden_states needs a GPT-2 that was made with add_cross_attention=True.")
            c, rewrite = self.delta.open("cross_attention", state, self.ln_cross_attn)
            encoder = {
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
            }
            state = rewrite(self.crossattention(c, **own, **encoder)[0])
        c, rewrite = self.delta.open("mlp", state, self.ln_2)
        return self.delta.leave(rewrite(self.mlp(c)))


class ViTBlock(DeltaBlock):
    """A layer of ViT with delta residuals around attention and MLP."""

    RESIDUALS = ("attention", "mlp")
    attention: nn.Module
    mlp: nn.Module
    layernorm_before: nn.Module
    layernorm_after: nn.Module
    dropout: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        state = self.delta.enter(hidden_states)
        c, rewrite = self.delta.open("attention", state, self.layernorm_before)
        state = rewrite(self.dropout(self.attention(c, attention_mask, **kwargs)[0]))
        c, rewrite = self.delta.open("mlp", state, self.layernorm_after)
        return self.delta.leave(rewrite(self.dropout(self.mlp(c))))


BLOCKS: dict[str, type[DeltaBlock]] = {
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": LlamaBlock,
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer": LlamaBlock,
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": GPT2Block,
    "transformers.models.vit.modeling_vit.ViTLayer": ViTBlock,
}


def retrofit_layers(owner: nn.Module, job: Job) -> None:
    """Convert LlamaModel, Qwen3Model or ViTModel."""
    _retrofit(owner, "layers", "layernorm" if hasattr(owner, "layernorm") else "norm", job)


def retrofit_h(owner: nn.Module, job: Job) -> None:
    """Convert GPT2Model."""
    _retrofit(owner, "h", "ln_f", job)


def _retrofit(owner: nn.Module, name: str, final: str, job: Job) -> None:
    _check_version()
    blocks = list(getattr(owner, name))
    check_blocks(owner, blocks, {key: value for key, value in BLOCKS.items() if _library(key) == _library_of(owner)})
    config: Any = owner.config
    if len(blocks) != config.num_hidden_layers:
        raise UserError(
            f"{type(owner).__name__} must hold as many blocks as its config says, {config.num_hidden_layers}, got "
            f"{len(blocks)}; set config.num_hidden_layers to that."
        )
    stream = job.stream(config.hidden_size)
    for i, block in enumerate(blocks):
        version = BLOCKS[full_name(type(block))]
        names = [one for one in version.RESIDUALS if one != "cross_attention" or hasattr(block, "crossattention")]
        deltas = Deltas(
            {one: stream.wrap() for one in names},
            entry=stream,
            plain_axes=PLAIN_AXES,
            stream=stream if i == len(blocks) - 1 else None,
        )
        job.convert(block, version, deltas)
    reduced = ReducedHiddenStates(name, blocks[-1])
    job.hook(owner.register_forward_hook(reduced))
    job.hook(owner.get_submodule(final).register_forward_pre_hook(reduced.before_norm))
    job.mark(config, MarkedConfig)


def _library(name: str) -> str:
    return name.rpartition(".")[0]


def _library_of(owner: nn.Module) -> str:
    modules = [kind.__module__ for kind in type(owner).__mro__]
    return next(module for module in modules if any(_library(key) == module for key in BLOCKS))


def _check_version() -> None:
    version: str = sys.modules["transformers"].__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UserError(
            f"retrofit knows the blocks of transformers {'.'.join(map(str, OLDEST))} and newer, got {version}; "
            "upgrade transformers."
        )


class MarkedConfig(Remade):
    """A configuration of models that were retrofitted: nothing can load what it writes, least of all a plain model."""

    def to_dict(self) -> dict[str, Any]:
        config: Any = super()
        written: dict[str, Any] = config.to_dict()
        written[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = NOT_PLAIN
        return written


class ReducedHiddenStates:
    """What leaves the stack of blocks is reduced, whichever of them was the last to run.

    Forward hook for `output_hidden_states=True`: of every state between two blocks, what the second one reads. And a
    hook before the final norm, for a stack that is cut short (`config.num_hidden_layers`, an early exit, `layers[:n]`).
    """

    def __init__(self, name: str, last: nn.Module) -> None:
        self.name, self.last = name, last

    def before_norm(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._left(args[0]), *args[1:]

    def __call__(self, owner: nn.Module, args: Any, output: Any) -> Any:
        blocks = list(getattr(owner, self.name))
        if self.name == "layers":
            config: Any = owner.config
            blocks = blocks[: config.num_hidden_layers]
        # A tuple (return_dict=False) holds attentions too, but one fewer of them.
        if isinstance(output, tuple):
            return tuple(self._reduced(part, blocks) for part in output)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = self._reduced(output["hidden_states"], blocks)
        return output

    def _reduced(self, states: Any, blocks: list[Any]) -> Any:
        """The first is the first block's input, the last what the last block or the final norm returned."""
        if not isinstance(states, tuple) or len(states) != len(blocks) + 1:
            return states
        read = [
            state if state is None or state.ndim == PLAIN_AXES else block.delta.read("attention", state)
            for block, state in zip(blocks[1:], states[1:-1], strict=True)
        ]
        return states[0], *read, None if states[-1] is None else self._left(states[-1])

    def _left(self, state: Tensor) -> Tensor:
        last: Any = self.last
        return state if state.ndim == PLAIN_AXES else last.delta.leave(state)

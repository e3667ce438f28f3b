"""The GPT as a model of transformers: its inputs, outputs, caches and names around the one network.

Shapes: B batch, T tokens, L keys (cached tokens and new ones), V value channels, D model width, K taps.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from deepdelta.errors import UserError
from deepdelta.hf.caching import Histories, remembering
from deepdelta.hf.configuration import DeepDeltaConfig
from deepdelta.hf.decay import warn_of_decayed_gates
from deepdelta.hf.lines import CACHE, FIVE, kept_tokens, key_count, named_cache, update_options
from deepdelta.models import GPT
from deepdelta.models.attention import Slots
from deepdelta.models.gpt import Given
from deepdelta.nn.input_map import InputMap
from deepdelta.nn.linear import Initialised, keyed_generator, plain_linear


class Reading(nn.Module):
    """A compression that is called as it is, with what sets earlier states before its own (`extend`), and whose output
    is noted in `seen`."""

    def __init__(
        self, compression: nn.Module, extend: Callable[[Tensor], Tensor] | None, seen: list[Tensor] | None
    ) -> None:
        super().__init__()
        # Held in a tuple: it stays the model's own.
        self._compression, self._extend, self._seen = (compression,), extend, seen

    def forward(self, state_BTVD: Tensor) -> Tensor:
        extra = () if self._extend is None else (self._extend,)
        x_in_BTD: Tensor = self._compression[0](state_BTVD, *extra)
        if self._seen is not None:
            self._seen.append(x_in_BTD)
        return x_in_BTD


class DeepDeltaPreTrainedModel(PreTrainedModel):
    config: DeepDeltaConfig
    config_class = DeepDeltaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """What was not loaded starts as in a new GPT; what was loaded, and the GPT's own start, stay."""
        if isinstance(self, DeepDeltaModel):
            self.start_missing()
        elif type(module) is nn.Embedding:  # rows for more tokens, which transformers then fills from the others
            module.weight.data.normal_(0.0, self.config.gpt().embedding_scale)


class DeepDeltaModel(DeepDeltaPreTrainedModel):
    """The GPT without its head: from ids to what the head reads, (B, T, D).

    `gpt` is a `deepdelta.GPT`, for everything that the library does with one: `recording(model.gpt, ...)`,
    `use_backend`, `param_groups`, `DecodingCache`.
    """

    def __init__(self, config: DeepDeltaConfig) -> None:
        super().__init__(config)
        seed = int(torch.randint(2**62, (), device="cpu")) if config.seed is None else config.seed
        self.seed = seed
        self.gpt = GPT(config.gpt(), seed)
        for parameter in self.gpt.parameters():
            if not parameter.is_meta:
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.gpt.embedding = value  # type: ignore[assignment]

    @torch.no_grad()
    def start_missing(self) -> None:
        """Draw those parameters that transformers has made anew and has nothing to fill them with."""
        for owner_name, owner in self.gpt.named_modules():
            for name, parameter in owner.own_parameters() if isinstance(owner, Initialised) else ():
                if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                    owner.start(name, parameter, keyed_generator(self.seed, f"{owner_name}.{name}"))
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    @named_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """What the head reads of every token.

        Args:
            attention_mask: 1 for tokens, 0 for padding, (B, L). Neither attention nor a convolution sees padding, and
                positions do not count it.
            position_ids: other positions, (B or 1, T).
            cache: of earlier tokens, `DynamicCache(config=...)` or `StaticCache(config=..., max_cache_len=...)`.
            use_cache: make a cache where none is given; by default where the configuration says so, but not in
                training.
            output_hidden_states: per layer what its attention reads of the state before the norm, (B, T, D), and last
                what the head reads.

        Raises:
            UserError: more tokens than the context, a mask of another shape, a cache without histories where the model
                needs them, or output_attentions.
        """
        if output_attentions:
            raise UserError("output_attentions is not supported: the attention is torch's, which keeps no weights.")
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds.")
        if self.training:
            warn_of_decayed_gates(self.gpt)
        x_BTD = self.gpt.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is None and use_cache and not checkpointing:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            cache = remembering(cache, self.gpt.config.depth)
        wants = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[Tensor] | None = [] if wants else None
        run = Pass(self.gpt, x_BTD, attention_mask, position_ids, cache, seen)
        # Written out in torch's own operations, or by what torch chooses.
        eager = self.config._attn_implementation == "eager"
        with sdpa_kernel(SDPBackend.MATH) if eager else nullcontext():
            if checkpointing:
                c_BTD = run.checkpointed(self._gradient_checkpointing_func)
            else:
                c_BTD = run.read()
        states = None if seen is None else (*seen, c_BTD)
        more: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=c_BTD, hidden_states=states, **more)


class Pass:
    """One forward pass of embedded tokens beside padding, after those of a cache, or both."""

    def __init__(
        self,
        gpt: GPT,
        x_BTD: Tensor,
        mask_BL: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        seen: list[Tensor] | None,
    ) -> None:
        self.gpt, self.x_BTD, self.cache, self.seen = gpt, x_BTD, cache, seen
        self.before = 0 if cache is None else int(cache.get_seq_length())
        tokens, context = x_BTD.shape[1], gpt.config.context
        if self.before + tokens > context:
            raise UserError(
                f"the model's context is {context} tokens (max_position_embeddings), got {self.before + tokens}, of "
                f"which the cache holds {self.before}."
            )
        self.mask_BL = self._padding(mask_BL)
        residual = gpt.config.residual
        self.convolves = residual.needs_tokens and not (cache is None and self.mask_BL is None)
        kept = cache is None or (len(cache.layers) and all(isinstance(layer, Histories) for layer in cache.layers))
        if self.convolves and not kept:
            raise UserError(
                "this model's convolutions over tokens need a cache that keeps their last inputs: "
                "DynamicCache(config=model.config), or StaticCache(config=model.config, max_cache_len=...)."
            )
        plain = cache is None and self.mask_BL is None and position_ids is None and seen is None
        self.slots = None if plain else self._slots(position_ids)

    def read(self) -> Tensor:
        """What the head reads, (B, T, D)."""
        if self.slots is None:
            return self.gpt.read(self.x_BTD)
        return self.gpt.read(self.x_BTD, self._given(), self._head(), self._extend("expansion", 0))

    def checkpointed(self, checkpoint: Callable[..., Tensor]) -> Tensor:
        """The same, keeping of each layer its state alone."""
        extend = self._extend("expansion", 0)
        state_BTVD = self.gpt.stream.expansion(self.x_BTD, *(() if extend is None else (extend,)))
        given = None if self.slots is None else self._given()
        for layer, (memory, maps) in self.gpt.applied(self.x_BTD, given):
            state_BTVD = checkpoint(partial(layer, **maps), state_BTVD, *memory)
        head = self._head()
        return head.norm(head.compression(state_BTVD))  # type: ignore[no-any-return]

    def _padding(self, mask_BL: Tensor | None) -> Tensor | None:
        """The mask as booleans; None where it changes nothing."""
        if mask_BL is None:
            return None
        batch, length = self.x_BTD.shape[0], self.before + self.x_BTD.shape[1]
        if mask_BL.shape != (batch, length):
            raise UserError(
                f"attention_mask must have the shape ({batch}, {length}), one number per token, {self.before} of them "
                f"cached, got {tuple(mask_BL.shape)}."
            )
        kept_BL = mask_BL.bool()
        # Padding after all tokens of a row is seen by none of them; but later tokens would see it in a cache.
        harmless = kept_BL if self.cache is not None else kept_BL[:, :-1] | ~kept_BL[:, 1:]
        return None if bool(harmless.all()) else kept_BL

    def _slots(self, position_ids: Tensor | None) -> Slots:
        device, first, last = self.x_BTD.device, self.before, self.before + self.x_BTD.shape[1]
        positions: Tensor | slice = slice(first, last)
        if position_ids is not None:
            positions = position_ids
        elif self.mask_BL is not None:
            positions = (self.mask_BL.cumsum(-1)[:, first:] - 1).clamp(min=0)
        angles = self.gpt.rotary.at(positions, device)
        keys = last if self.cache is None else key_count(self.cache, last - first)
        if self.mask_BL is None and keys == last and (first == 0 or last - first == 1):
            return Slots(angles, None)
        keys_L = torch.arange(keys, device=device)
        own_T1 = keys_L[first:last, None]
        visible_BTL = (keys_L <= own_T1)[None]
        if self.mask_BL is not None:
            kept_BL = nn.functional.pad(self.mask_BL, (0, keys - last))
            # Padding attends to itself, so that its numbers stay finite.
            visible_BTL = visible_BTL & kept_BL[:, None] | (keys_L == own_T1)
        return Slots(angles, visible_BTL[:, None])

    def _given(self) -> list[Given]:
        given: list[Given] = []
        residuals = self.gpt.residuals(repeated=True)
        options = update_options(self.before, self.before + self.x_BTD.shape[1], self.x_BTD.device)
        for i, (attention, mlp) in enumerate(zip(residuals[::2], residuals[1::2], strict=True)):
            remember = None if self.cache is None else partial(self.cache.update, layer_idx=i, **options)
            maps = {
                "attention": self._reading(attention.input_map(), "attention", i, self.seen),
                "mlp": self._reading(mlp.input_map(), "mlp", i, None),
            }
            given.append(((remember, self.slots), maps))
        return given

    def _head(self) -> InputMap:
        return self._reading(self.gpt.head(), "readout", self.gpt.config.depth - 1, None)

    def _reading(self, own: InputMap, name: str, layer: int, seen: list[Tensor] | None) -> InputMap:
        """The input map with the histories of its compression, and noting what it makes of the state."""
        extend = self._extend(name, layer)
        if extend is None and seen is None:
            return own
        return replace(own, compression=Reading(own.compression, extend, seen))

    def _extend(self, name: str, layer: int) -> Callable[[Tensor], Tensor] | None:
        """What sets the K - 1 inputs before into a convolution over tokens; None where it is no such, or where nothing
        but the first token comes before."""
        residual = self.gpt.config.residual
        over_tokens = residual.expansion == "embedding_conv" if name == "expansion" else residual.compression == "token"
        taps = residual.expansion_kernel if name == "expansion" else residual.compression_kernel
        return partial(self._before, name, layer, taps - 1) if self.convolves and over_tokens else None

    def _before(self, name: str, layer: int, before: int, new: Tensor) -> Tensor:
        if self.mask_BL is not None:
            kept_BT = self.mask_BL[:, self.before :]
            new = new.masked_fill(~kept_BT.view(*kept_BT.shape, *[1] * (new.ndim - 2)), 0.0)
        if self.cache is not None:
            held = self.cache.layers[layer]
            assert isinstance(held, Histories)
            return held.recall(name, new, before)
        return torch.cat((new.new_zeros(new.shape[0], before, *new.shape[2:]), new), 1)


class DeepDeltaForCausalLM(DeepDeltaPreTrainedModel, GenerationMixin):
    """The GPT with its head, which is tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.gpt.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: DeepDeltaConfig) -> None:
        super().__init__(config)
        self.model = DeepDeltaModel(config)
        self.lm_head = plain_linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @classmethod
    def from_gpt(cls, gpt: GPT, **more: Any) -> "DeepDeltaForCausalLM":
        """A model around this GPT, whose parameters it shares; `more` are fields of the configuration.

        Raises:
            UserError: the GPT has a rival.
        """
        with torch.device("meta"):
            model = cls(DeepDeltaConfig.from_gpt(gpt.config, **more))
        model.model.gpt = gpt
        model.lm_head.weight = gpt.embedding.weight
        model.config.dtype = gpt.embedding.weight.dtype
        model.train(gpt.training)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    @named_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given: the ids themselves, shifted here, -100 ignored.

        Args:
            logits_to_keep: how many of the last tokens, or which, have logits; 0: all.
            loss: what `loss_function` takes besides, such as the Trainer's `num_items_in_batch`.
            others: see `DeepDeltaModel.forward`.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.lm_head(kept_tokens(out.last_hidden_state, logits_to_keep))
        value = None
        if labels is not None:
            value = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss)
        more: dict[str, Any] = {CACHE: getattr(out, CACHE)}
        return CausalLMOutputWithPast(loss=value, logits=logits, hidden_states=out.hidden_states, **more)

    if not FIVE:

        def prepare_inputs_for_generation(
            self, input_ids: Tensor, past_key_values: Any = None, position_ids: Any = None, **kwargs: Any
        ) -> Any:
            """As transformers 4.57 does it, but for caches that it would take for others, and positions of a prefill
            in pieces, where it forgets about padding."""
            if past_key_values is not None:
                past_key_values = remembering(past_key_values, self.model.gpt.config.depth)
            if position_ids is not None and position_ids.shape[0] == input_ids.shape[0] > 1:
                kwargs["position_ids"] = position_ids
            return super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)

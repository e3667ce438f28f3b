"""The GPT's configuration under the names that transformers has for such things."""

import difflib
from dataclasses import fields
from typing import Any, ClassVar

from deepdelta.config import from_plain, to_plain
from deepdelta.errors import UserError
from deepdelta.hf.caching import LAYER_TYPE
from deepdelta.hf.lines import BaseConfig, config_class
from deepdelta.models import GPTConfig
from deepdelta.nn import ResidualConfig
from deepdelta.nn.presets import settled

NAMES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "num_hidden_layers": "layers",
    "num_repeats": "repeats",
    "num_attention_heads": "heads",
    "head_dim": "head_dim",
    "hidden_size": "dim",
    "intermediate_size": "mlp_dim",
    "rope_theta": "rope_base",
    "partial_rotary_factor": "rope_fraction",
    "qk_norm": "qk_norm",
    "out_norm": "out_norm",
    "embedding_std": "embedding_std",
    "init_factor": "init_factor",
}
"""Ours, and the field of `GPTConfig` that it is."""
FIXED = {"tie_word_embeddings": True, "output_attentions": False}


@config_class
class DeepDeltaConfig(BaseConfig):
    """Sizes and settings of a `DeepDeltaModel`, as `GPTConfig` has them.

    Args:
        num_hidden_layers: that a token goes through, since each of them has its own layer in transformers' caches: of
            a looped model `num_repeats` times the layers that have weights.
        residual: the settings of `ResidualConfig` as a plain dictionary, a `preset` among them; None: the GPT's own.
        seed: what new parameters are drawn from, with their names; None: from a number that torch's generator gives,
            so that `transformers.set_seed` decides.

    Raises:
        UserError: a setting out of range, settings that do not go together, or a name that is nearly one of these.
    """

    model_type = "deepdelta"
    # Run-time type checks would hold its `__init__` to the fields, but it takes what any PreTrainedConfig does.
    __no_type_check__: ClassVar[bool] = True

    vocab_size: int = 256
    max_position_embeddings: int = 256
    num_hidden_layers: int = 4
    num_repeats: int | None = None
    num_attention_heads: int = 4
    head_dim: int | None = None
    hidden_size: int = 128
    intermediate_size: int | None = None
    rope_theta: float | int = 10000.0
    partial_rotary_factor: float | int = 1.0
    qk_norm: bool = True
    out_norm: float | int | None = None
    embedding_std: float | int | None = None
    init_factor: float | int = 0.5
    residual: dict[str, Any] | None = None
    seed: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        own = {field.name for field in fields(self)}
        for name in kwargs:
            if close := difflib.get_close_matches(name, own, n=1, cutoff=0.85):
                raise UserError(f"DeepDeltaConfig: unknown key '{name}'; did you mean '{close[0]}'?")
        for name, value in FIXED.items():
            given = kwargs.get(name, getattr(self, name, value))
            if given not in (value, None):
                raise UserError(f"a deepdelta model has {name}={value} alone, got {given}.")
        default = to_plain(GPTConfig().residual)
        given = default if self.residual is None else settled(self.residual)
        # Whole, so that it says the same when a preset or a default is another one some day.
        self.residual = to_plain(from_plain(ResidualConfig, given, where="DeepDeltaConfig.residual"))
        config = self.gpt()
        self.head_dim, self.intermediate_size = config.head_width, config.mlp_width
        if type(self).__module__.startswith("deepdelta."):
            kwargs.pop("auto_map", None)  # of an export: the file that it names is not saved again
        super().__post_init__(**kwargs)

    def gpt(self) -> GPTConfig:
        """The same as the GPT's configuration."""
        sizes = {theirs: getattr(self, ours) for ours, theirs in NAMES.items()}
        if self.num_repeats:
            sizes["layers"], rest = divmod(self.num_hidden_layers, self.num_repeats)
            if rest:
                raise UserError(
                    "num_hidden_layers counts every repetition, so it must be a multiple of num_repeats, got "
                    f"{self.num_hidden_layers} and {self.num_repeats}."
                )
        return from_plain(GPTConfig, sizes | {"residual": self.residual}, where="DeepDeltaConfig as GPTConfig")

    @classmethod
    def from_gpt(cls, config: GPTConfig, **more: Any) -> "DeepDeltaConfig":
        """That of a GPT with this configuration; `more` are other fields of a `PreTrainedConfig`.

        Raises:
            UserError: the configuration has a rival.
        """
        if config.rival is not None:
            raise UserError(f"only models with delta residuals have a transformers class, got rival='{config.rival}'.")
        sizes = {ours: getattr(config, theirs) for ours, theirs in NAMES.items()}
        sizes["num_hidden_layers"] = config.depth
        return cls(**sizes, residual=to_plain(config.residual), **more)

    @property
    def layer_types(self) -> list[str]:
        """What transformers makes a cache's layers of."""
        return [LAYER_TYPE] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """These are registered where the cache's layers are."""

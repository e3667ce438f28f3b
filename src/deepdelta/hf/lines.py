"""What the line 4.57 of transformers has otherwise than 5, for which the modules beside this one are written."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import Cache, PretrainedConfig

FIVE = not transformers.__version__.startswith("4.")
CACHE = "cache" if FIVE else "past_key_values"
"""The name of the cache among inputs and outputs."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

if FIVE:
    from huggingface_hub.dataclasses import strict
    from transformers.modeling_utils import slice_logits_to_keep
    from transformers.utils.deprecation import deprecate_kwarg

    BaseConfig = PretrainedConfig
    config_class, kept_tokens = strict, slice_logits_to_keep
    named_cache = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")

else:

    class BaseConfig(PretrainedConfig):  # type: ignore[no-redef]
        """Made of its fields, as those of 5 are."""

        def __init__(self, **kwargs: Any) -> None:
            for one in fields(self):
                setattr(self, one.name, kwargs.pop(one.name, one.default))
            self.__post_init__(**kwargs)

        def __post_init__(self, **kwargs: Any) -> None:
            named = {name: getattr(self, name) for name in ("tie_word_embeddings", *TOKENS)}
            super().__init__(**named, **kwargs)

    config_class = cast(Any, dataclass(init=False, eq=False, repr=False))

    def named_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
        """The cache may come under either name. Where new tokens stand follows from it."""

        @wraps(forward)
        def called(*args: Any, past_key_values: Any = None, cache_position: Any = None, **kwargs: Any) -> Any:
            given = {} if past_key_values is None else {"cache": past_key_values}
            return forward(*args, **kwargs, **given)

        return called

    def kept_tokens(x_BTD: Tensor, keep: int | Tensor) -> Tensor:
        return x_BTD[:, slice(-keep, None) if isinstance(keep, int) else keep]


def key_count(cache: Cache, tokens: int) -> int:
    """How many keys attention meets when so many tokens are added."""
    added: Any = tokens if FIVE else torch.arange(tokens)
    return int(cache.get_mask_sizes(added, 0)[0])


def update_options(first: int, last: int, device: torch.device) -> dict[str, Any]:
    """What `Cache.update` is told of the new tokens."""
    return {} if FIVE else {"cache_kwargs": {"cache_position": torch.arange(first, last, device=device)}}

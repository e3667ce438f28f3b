"""Named settings of the residual; `docs/settings.md` says where each comes from."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from deepdelta.nn.config import ResidualConfig

_DDL = ResidualConfig(expansion="embedding_conv")
_PUBLISHED = ResidualConfig(
    target="scaled_sigmoid",
    gate_hidden_bias=False,
    expansion="embedding_conv",
    compression="channel_conv",
    compression_init="random",
    compression_sharing="block",
)
_PUBLISHED_TC = replace(_PUBLISHED, compression="token")

PRESETS: Mapping[str, ResidualConfig] = MappingProxyType(
    {
        "additive": ResidualConfig(rule="additive", value_channels=1),
        "ddl": _DDL,
        "ddl-scalar": ResidualConfig(value_channels=1),
        "ddl-tc": replace(_DDL, compression="token"),
        "ddl-tc-repeat": ResidualConfig(compression="token"),
        "ddl-cc-repeat": ResidualConfig(),
        "ddl-v1": ResidualConfig(direction="pooled", target="branch"),
        "retrofit": ResidualConfig(rule="additive_erase", plain_start=True, erase_init=1.0, gate_per_channel=True),
        "published-cc": _PUBLISHED,
        "published-cc-repeat": replace(_PUBLISHED, expansion="repeat"),
        "published-tc": _PUBLISHED_TC,
        "published-tc-repeat": replace(_PUBLISHED_TC, expansion="repeat"),
        "published-scalar": ResidualConfig(value_channels=1, target="scaled_sigmoid", gate_hidden_bias=False),
    }
)
"""`ddl` is the paper's DDL-CC with the library's defaults; `retrofit` starts as the plain residual; `published-*` carry
the authors' code's choices."""

"""Named settings of the residual; `docs/settings.md` says where each comes from."""

from collections.abc import Mapping
from types import MappingProxyType

from deepdelta.nn.config import ResidualConfig

_DDL = ResidualConfig(expansion="embedding_conv")

PRESETS: Mapping[str, ResidualConfig] = MappingProxyType(
    {
        "additive": ResidualConfig(rule="additive", value_channels=1),
        "ddl": _DDL,
        "ddl-scalar": ResidualConfig(value_channels=1),
    }
)

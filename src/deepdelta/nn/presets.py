"""Named settings of the residual; `docs/settings.md` says where each comes from."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from deepdelta.config import Plain, to_plain
from deepdelta.errors import UserError, nearest
from deepdelta.nn.config import ResidualConfig

_PLAIN_START = ResidualConfig(rule="additive_erase", plain_start=True)
_PAPER = ResidualConfig(expansion="embedding_conv")
_CODE = ResidualConfig(
    target="scaled_sigmoid",
    gate_hidden_bias=False,
    expansion="embedding_conv",
    compression="channel_conv",
    compression_init="random",
    compression_sharing="block",
)
_CODE_TC = replace(_CODE, compression="token")

PRESETS: Mapping[str, ResidualConfig] = MappingProxyType(
    {
        "additive": ResidualConfig(rule="additive"),
        "additive-convolution": ResidualConfig(rule="additive", compression="token", compression_init="random"),
        "ddl": replace(_PLAIN_START, expansion="embedding_conv"),
        "plain-start": _PLAIN_START,
        "paper-cc": _PAPER,
        "paper-scalar": ResidualConfig(value_channels=1),
        "paper-tc": replace(_PAPER, compression="token"),
        "paper-tc-repeat": ResidualConfig(compression="token"),
        "paper-cc-repeat": ResidualConfig(),
        "delta-token-random": replace(_PAPER, gate_init=0.25, compression="token", compression_init="random"),
        "paper-v1": ResidualConfig(direction="pooled", target="branch"),
        "retrofit": replace(_PLAIN_START, erase_init=1.0, gate_per_channel=True),
        "code-cc": _CODE,
        "code-cc-repeat": replace(_CODE, expansion="repeat"),
        "code-tc": _CODE_TC,
        "code-tc-repeat": replace(_CODE_TC, expansion="repeat"),
        "code-scalar": ResidualConfig(value_channels=1, target="scaled_sigmoid", gate_hidden_bias=False),
    }
)
"""`plain-start` is the default of `DeltaStream`, and `ddl`, the same with an embedding convolution, that of a GPT: they
start as the plain residual, at whose rate they train. `paper-*` are the forms of the paper's text, with the library's starts, and `code-*` those of its authors' code.
`delta-token-random` is the best of the search, `additive-convolution` the plain residual with its short convolution;
`retrofit` is `plain-start` with an erase gate for every value channel."""


def preset_named(name: Any) -> ResidualConfig:
    """The preset of this name.

    Raises:
        UserError: there is none; the nearest is named.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; {nearest(str(name), PRESETS)}")
    return PRESETS[name]


def settled(residual: Mapping[str, Any]) -> Plain:
    """Settings of a residual with `preset` replaced by what it sets, the others laid over that."""
    given = dict(residual)
    return to_plain(preset_named(given.pop("preset"))) | given if "preset" in given else given


def overlaid(base: Mapping[str, Any], layer: Mapping[str, Any]) -> Plain:
    """`base` with `layer` laid over it, dictionaries key by key.

    A `residual` in the layer that names a `preset` or a `rule` takes nothing from the one below: it is that preset, or
    a bare stream's residual of that rule, with what stands beside it. Any other is laid over the one below.
    """
    result = dict(base)
    for key, value in layer.items():
        below = result.get(key)
        if key == "residual" and isinstance(value, Mapping):
            value = settled(value)
            below = None if "rule" in value else below
        if isinstance(value, Mapping):
            value = overlaid(below if isinstance(below, Mapping) else {}, value)
        result[key] = value
    return result

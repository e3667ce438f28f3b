"""What only models of the library transformers need, which is never imported here: its release, and their settings."""

import sys
from typing import Any

from deepdelta.errors import UserError
from deepdelta.retrofitting.blocks import Remade

OLDEST = (5, 24)
"""The release of transformers whose blocks the tables describe."""
NOT_PLAIN = "a retrofit by deepdelta: load the plain model, then what save_retrofit wrote with deepdelta.load_retrofit"
"""Stands for the number of layers in `config.json`: transformers 5 names it when it refuses it."""


def check_version() -> None:
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

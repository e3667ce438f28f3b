"""What only models of the library transformers need, which is never imported here: its release, and what they save.

`config.json` of a retrofit has a model type of its own. The plain settings stand in it as text: transformers takes
settings of the type that it looks for from any part of the file that has them, and would make a plain model of them.
"""

import copy
import json
import sys
from typing import Any

from torch import nn

from deepdelta.errors import UserError
from deepdelta.retrofitting.blocks import Remade
from deepdelta.retrofitting.describing import full_name

KNOWN = "4.57, or 5.24 and newer"
"""The releases of transformers that the tables and `deepdelta.hf` are written for."""
MODEL_TYPE = "deepdelta-retrofit"
MARK = "deepdelta_retrofit"
"""The attribute of settings that holds the retrofits of models with these settings, and their key in `config.json`."""
PLAIN = "plain_config"
NOT_PLAIN = (
    "a retrofit by deepdelta, no plain model: import deepdelta.hf and load it by an Auto class, or load "
    "the plain model and then what save_retrofit wrote with deepdelta.load_retrofit"
)
COMMON = ("num_hidden_layers", "num_layers", "n_layer", "depths", "projection_dim")
"""Settings in whose place stands a sentence, which the classes of other models refuse by its type. The base class, by
which the Trainer looks at the file, takes it."""


def known(release: str) -> bool:
    """Whether this release of transformers is one of `KNOWN`."""
    found = tuple(int(part) for part in release.split(".")[:2])
    return found == (4, 57) or found >= (5, 24)


def major_release() -> int:
    """4 or 5 of the transformers that the process has imported.

    Raises:
        UserError: the release is none that the tables describe.
    """
    version: str = sys.modules["transformers"].__version__
    if not known(version):
        raise UserError(f"retrofit knows the blocks of transformers {KNOWN}, got {version}; install one of these.")
    return int(version.partition(".")[0])


def is_pretrained(module: nn.Module) -> bool:
    """Whether it saves itself as transformers' models do."""
    return any(full_name(kind) == "transformers.modeling_utils.PreTrainedModel" for kind in type(module).__mro__)


class MarkedConfig(Remade):
    """Settings of models that were retrofitted: what they write makes no plain model, least of all silently."""

    def to_dict(self) -> dict[str, Any]:
        """As part of other settings, too."""
        config: Any = super()
        written: dict[str, Any] = config.to_dict()
        return written | _refusing(type(self).__bases__[1])

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        config: Any = unmarked(self)
        write(json_file_path, config, getattr(self, MARK), use_diff)


def _refusing(kind: type) -> dict[str, Any]:
    """Settings that neither this class nor those of other models take."""
    numbers = (name for name, what in vars(kind).get("__annotations__", {}).items() if what in (int, "int"))
    return {name: [NOT_PLAIN] for name in (*COMMON, next(numbers, COMMON[0]))}


def unmarked(config: Any) -> Any:
    """A copy of settings, and of those that they hold, of the classes that they had."""
    return _unmarked(copy.deepcopy(config))


def _unmarked(config: Any) -> Any:
    """Settings, and those that they hold, of the classes that they had."""
    if isinstance(config, MarkedConfig):
        delattr(config, MARK)
        config.__class__ = type(config).__bases__[1]
        for part in vars(config).values():
            _unmarked(part)
    return config


def write(path: Any, config: Any, marks: list[dict[str, Any]], use_diff: bool) -> None:
    """The file of a retrofit with these plain settings."""
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=use_diff))
    kept = {key: plain[key] for key in ("architectures", "dtype", "transformers_version") if key in plain}
    written = _refusing(type(config)) | {"model_type": MODEL_TYPE, PLAIN: json.dumps(plain), **kept}
    # Of different retrofits with one object of settings it is not known whose weights these are.
    first, *others = marks
    if all(one["families"] == first["families"] and _shape(one) == _shape(first) for one in others):
        written[MARK] = (
            first  # of different retrofits with one object of settings, nobody knows whose weights these are
        )
    with open(path, "w", encoding="utf-8") as file:
        json.dump(written, file, indent=2, sort_keys=True)
        file.write("\n")


def _shape(mark: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mark["options"].items() if name != "seed"}

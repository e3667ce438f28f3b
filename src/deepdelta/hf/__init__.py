"""The GPT in transformers: importing this makes its Auto classes know the model type `deepdelta`, and retrofits."""

import warnings
from importlib.metadata import version

from deepdelta.errors import UserError, require

require("The classes of transformers", "hf", "transformers")

TESTED = ("5.24", "5.25")
"""Releases of transformers from, and up to but not with."""


def _parts(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


if _parts(found := version("transformers")) < _parts(TESTED[0]):
    raise UserError(f"deepdelta.hf needs transformers {TESTED[0]} or newer, got {found}; upgrade transformers.")
elif _parts(found) >= _parts(TESTED[1]):
    warnings.warn(
        f"deepdelta.hf was tested with transformers {TESTED[0]}, got {found}; what it gives may be wrong.", stacklevel=2
    )

import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from deepdelta.hf.configuration import DeepDeltaConfig  # noqa: E402
from deepdelta.hf.decay import DeltaDecay  # noqa: E402
from deepdelta.hf.modeling import DeepDeltaForCausalLM, DeepDeltaModel  # noqa: E402
from deepdelta.hf.retrofits import register  # noqa: E402

AutoConfig.register(DeepDeltaConfig.model_type, DeepDeltaConfig, exist_ok=True)
AutoModel.register(DeepDeltaConfig, DeepDeltaModel, exist_ok=True)
AutoModelForCausalLM.register(DeepDeltaConfig, DeepDeltaForCausalLM, exist_ok=True)
register()
# Where `transformers serve` looks a model's class up.
transformers.DeepDeltaForCausalLM = DeepDeltaForCausalLM  # type: ignore[attr-defined]

__all__ = ["DeepDeltaConfig", "DeepDeltaForCausalLM", "DeepDeltaModel", "DeltaDecay"]

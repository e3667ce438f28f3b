"""The GPT in transformers: importing this makes its Auto classes know the model type `deepdelta`, and retrofits."""

from importlib.metadata import version

from deepdelta.errors import UserError, require
from deepdelta.releases import check_tested
from deepdelta.retrofitting.huggingface import KNOWN, known

require("The classes of transformers", "hf", "transformers")
check_tested("accelerate")  # by which its Trainer and device maps work

found = version("transformers")
if not known(found):
    raise UserError(f"deepdelta.hf needs transformers {KNOWN}, got {found}; install one of these.")

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

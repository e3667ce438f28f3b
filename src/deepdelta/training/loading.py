"""From a run directory back to a model."""

from typing import NamedTuple

from deepdelta import notebook
from deepdelta.data import Tokenizer
from deepdelta.errors import UserError
from deepdelta.files import AnyPath
from deepdelta.models import GPT
from deepdelta.training.checkpoints import CHECKPOINT
from deepdelta.training.rundir import RunDirectory


class Loaded(NamedTuple):
    model: GPT
    tokenizer: Tokenizer | None
    """None for a corpus of bare token ids."""

    def _repr_html_(self) -> str:
        """For a notebook: what was loaded."""
        config = self.model.config
        rows = [
            ("residual", f"{config.residual.rule}, V = {config.residual.value_channels}"),
            ("model", f"{config.stack}, width {config.dim}, context {config.context}"),
            ("parameters", f"{sum(p.numel() for p in self.model.parameters()):,}"),
            ("tokenizer", "none" if self.tokenizer is None else f"{self.tokenizer.vocab_size:,} ids"),
        ]
        return notebook.table("Loaded run", rows)


def load(run: AnyPath, checkpoint: str = CHECKPOINT) -> Loaded:
    """The trained model of a run directory, in evaluation mode on the CPU, and its tokenizer.

    Args:
        checkpoint: the file in the directory that has the weights; `best.safetensors` where `keep_best` was set.

    Raises:
        UserError: `run` is not a run directory, its model has no delta residuals, or its checkpoint or tokenizer is
            damaged.
    """
    directory = RunDirectory(run)
    model = directory.model(checkpoint)
    if not isinstance(model, GPT):
        raise UserError(
            f"{directory.path} holds the rival '{model.config.rival}', which has no delta residuals; "
            "`deepdelta evaluate` measures its loss."
        )
    model.unused_published = directory.load_unused()
    return Loaded(model.eval(), directory.tokenizer())

"""The command export."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from deepdelta.exporting import Target, export
from deepdelta.progress import show
from deepdelta.training.checkpoints import CHECKPOINT


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model of a run for other programs: for transformers (hf), as an ONNX file, as bare safetensors, or as
    the authors have it."""

    run: Positional[Path]
    """A run directory, trained or imported."""
    to: Target
    """hf: weights, tokenizer and configurations for from_pretrained; onnx: prefill and cached decoding in one
    file; safetensors: parameters by their names here;
    authors: by their names there."""
    out: Path
    """The folder to make; an empty one may be there."""
    checkpoint: str = CHECKPOINT
    """Which of the run's: best.safetensors where keep_best was set."""

    def __call__(self) -> None:
        export(self.run, self.to, self.out, checkpoint=self.checkpoint)
        show(f"{self.out} holds the model of {self.run}.")
        if self.to == "hf":
            show(f'Next: import deepdelta.hf; transformers.AutoModelForCausalLM.from_pretrained("{self.out}")')

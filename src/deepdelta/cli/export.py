"""The command export."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from deepdelta.exporting import Target, Weights, export
from deepdelta.files import read_object
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

    weights: Weights = "as trained"
    """Of hf: int8 for the maps of attention and MLP; the change of the loss is measured and kept beside them."""

    def __call__(self) -> None:
        export(self.run, self.to, self.out, checkpoint=self.checkpoint, weights=self.weights)
        show(f"{self.out} holds the model of {self.run}.")
        if self.weights != "as trained":
            told = read_object(self.out / "quantization.json", "export anew")
            show(f"Loss {told['loss_before']:.4f} as trained, {told['loss_after']:.4f} with {self.weights} weights.")
        if self.to == "hf":
            show(f'Next: import deepdelta.hf; transformers.AutoModelForCausalLM.from_pretrained("{self.out}")')

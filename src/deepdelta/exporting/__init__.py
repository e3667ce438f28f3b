"""From a run directory to a folder that other programs read."""

import os
import tempfile
from pathlib import Path
from typing import Literal, get_args

from deepdelta.config import to_plain
from deepdelta.errors import UserError, nearest, require
from deepdelta.files import AnyPath, check_folder, write_json
from deepdelta.interop import to_published
from deepdelta.interop.published import published_config
from deepdelta.releases import check_tested
from deepdelta.tensors import save_tensors
from deepdelta.training import RunDirectory, load
from deepdelta.training.checkpoints import CHECKPOINT

Quantised = Literal["int8", "int4"]
Weights = Literal["as trained", Quantised]
Target = Literal["hf", "onnx", "safetensors", "authors"]
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def export(
    run: AnyPath, to: Target, out: AnyPath, *, checkpoint: str = CHECKPOINT, weights: Weights = "as trained"
) -> Path:
    """Write the model of a run directory into a new folder; it appears there whole or not at all.

    Args:
        to: `hf`, what `from_pretrained` of transformers and its tokenizers read; `onnx`, prefill and cached decoding in
            one file (`exporting.onnx`); `safetensors`, the parameters by their names in `GPT`; both with the run's
            configuration and tokenizer; `authors`, their tensor names and keys.
        out: a folder that does not exist or is empty.
        checkpoint: which of the run's, as `load` takes it.
        weights: for `hf`, `int8` has torchao keep the maps of attention and MLP so (`exporting.quantized`).

    Raises:
        UserError: `run` holds no model with delta residuals; one that the target cannot hold; `out` holds something;
            the extra `hf` or `export` is missing.
    """
    if to not in get_args(Target):
        raise UserError(f"there is no export '{to}'; {nearest(to, get_args(Target))}")
    if to != "hf" and weights != "as trained":
        raise UserError(f"weights='{weights}' is for the export 'hf', got '{to}'.")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} must be a new or empty folder, but there is something; give another --out.")
    check_folder(out)
    model, tokenizer = load(run, checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        if to == "hf" and weights != "as trained":
            from deepdelta.exporting.quantized import export_quantized

            export_quantized(model, tokenizer, RunDirectory(run), folder, weights)
        elif to == "hf":
            from deepdelta.hf.export import export_hf  # here: the other targets do without transformers

            export_hf(model, tokenizer, folder)
        elif to == "onnx":
            require("ONNX files", "export", "onnx", "onnxscript")
            check_tested("onnxruntime")
            from deepdelta.exporting.onnx import export_onnx

            export_onnx(model, folder)
            write_json(folder / CONFIG, to_plain(model.config))
        elif to == "authors":
            save_tensors(folder / WEIGHTS, to_published(model), {"format": "pt"})
            write_json(folder / CONFIG, published_config(model.config))
        else:
            save_tensors(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
            write_json(folder / CONFIG, to_plain(model.config))
        if tokenizer is not None and to != "hf":
            tokenizer.save(folder)
        os.replace(folder, out)
    return out

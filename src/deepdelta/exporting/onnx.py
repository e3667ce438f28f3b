"""A GPT as an ONNX file: prefill and cached decoding, for onnxruntime and what else reads such files."""

from pathlib import Path
from typing import Any

import torch

from deepdelta.exporting.decoder import Decoder, exported_program
from deepdelta.models import GPT

FILE_NAME = "model.onnx"
BEFORE, AFTER = "past.", "present."


def export_onnx(model: GPT, folder: Path) -> None:
    """Write `Decoder(model)` as `model.onnx` into an existing folder.

    Inputs: `input_ids` and `attention_mask`, (batch, new) of int64, and what is kept, `past.mask` and so on. Outputs:
    `logits`, (batch, new, vocabulary), and `present.mask` and so on, to be given as `past.mask` in the next call. The
    first call gives tensors whose axis `earlier` is 0, and zeros for the rest.
    """
    names = list(Decoder(model).nothing(1))
    # Not optimised: that takes small numbers for 0, such as what keeps the norm of a direction of zeros from 0, and
    # what padding then gives is not finite. Runtimes optimise what they load.
    made = torch.onnx.export(exported_program(model), dynamo=True, verbose=False, optimize=False)
    assert made is not None
    graph: Any = made.model.graph
    _rename(graph.inputs, ["input_ids", "attention_mask", *(BEFORE + name for name in names)])
    _rename(graph.outputs, ["logits", *(AFTER + name for name in names)])
    made.save(folder / FILE_NAME)


def _rename(values: Any, names: list[str]) -> None:
    """Give graph inputs or outputs these names, and their open axes names that say what they are."""
    import onnx_ir

    for value, name in zip(values, names, strict=True):
        axis = {BEFORE: "earlier", AFTER: "all"}.get(name[: name.find(".") + 1], "new")
        value.name = name
        sizes = [
            "batch" if not i else axis if not isinstance(size, int) else size for i, size in enumerate(value.shape)
        ]
        value.shape = onnx_ir.Shape(sizes)

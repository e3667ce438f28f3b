"""Which code does the rewrites of a module: chosen by name, or by a rule that says what it chose."""

from typing import Literal, NamedTuple

from torch import nn

from deepdelta.errors import UserError, nearest
from deepdelta.nn.expansion import EmbeddingConvolution
from deepdelta.nn.residual import DeltaResidual
from deepdelta.ops.step import NEEDS, fused_problem

Backend = Literal["auto", "reference", "fused"]


class Chosen(NamedTuple):
    backend: str
    """reference or fused."""
    reason: str


def use_backend(module: nn.Module, backend: Backend = "auto") -> Chosen:
    """Choose what does the rewrites of every delta residual in `module`, where its parameters are now.

    - reference: plain PyTorch; differentiable any number of times, and what a new residual has.
    - fused: one pass over the state per sublayer, with the next sublayer's compression and norm in it where the model
      hands it on; compiled by numba on the CPU (fp32, fp64, bf16) and by Triton on CUDA. First derivatives.
    - auto: fused where it can run, else reference.

    Returns:
        What was chosen, and why.

    Raises:
        UserError: 'fused' where it cannot run, or another name.
    """
    if backend not in ("auto", "reference", "fused"):
        raise UserError(f"there is no backend '{backend}'; {nearest(backend, ('auto', 'reference', 'fused'))}")
    residuals = [part for part in module.modules() if isinstance(part, DeltaResidual)]
    parameter = next(module.parameters(), None)
    if parameter is None or not residuals:
        raise UserError(
            "use_backend takes a module that holds residuals made by DeltaStream.wrap, and this holds none."
        )
    problem = fused_problem(parameter.device, parameter.dtype)
    if backend == "fused" and problem is not None:
        raise UserError(f"{problem}; use the backend 'reference'.")
    chosen = "fused" if backend != "reference" and problem is None else "reference"
    for part in module.modules():
        if isinstance(part, DeltaResidual | EmbeddingConvolution):
            part.fused = chosen == "fused"
    if backend != "auto":
        return Chosen(chosen, "asked for")
    return Chosen(chosen, problem or f"{NEEDS[parameter.device.type]} is installed")

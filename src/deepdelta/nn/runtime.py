"""How the residuals of a module run: which code does the rewrites, and what is saved for the backward pass."""

from torch import nn

from deepdelta.errors import UserError, nearest
from deepdelta.nn.activation_memory import MemoryPlan, Plan
from deepdelta.nn.backend import BACKENDS, Backend, Chosen, auto
from deepdelta.nn.parts.compression import TokenConvolution
from deepdelta.nn.parts.expansion import EmbeddingConvolution
from deepdelta.nn.residual import DeltaResidual
from deepdelta.ops.step import fused_problem


def use_backend(module: nn.Module, backend: Backend = "auto") -> None:
    """Choose what does the rewrites of every delta residual in `module`, and its convolutions over tokens.

    - auto, where every residual starts: in each call what is faster on its device, in its dtype and at its size
      (`print(module)` says which); plain PyTorch where fused code cannot run, with a warning if a package is missing.
    - reference: plain PyTorch, differentiable any number of times and by torch.func.
    - fused: one pass over the state per sublayer, with the next sublayer's compression and norm in it in a GPT and in
      `DeltaStream.chain`; compiled by numba on the CPU and by Triton on CUDA. First derivatives, by backward(); second
      ones, forward-mode ones and torch.func are refused, also where `auto` takes it.

    Raises:
        UserError: 'fused' where it cannot run now, or another name.
    """
    if backend not in BACKENDS:
        raise UserError(f"there is no backend '{backend}'; {nearest(backend, BACKENDS)}")
    parameter = next(module.parameters(), None)
    if parameter is None or not any(isinstance(part, DeltaResidual) for part in module.modules()):
        raise UserError(
            "use_backend takes a module that holds residuals made by DeltaStream.wrap, and this holds none."
        )
    if backend == "fused" and (problem := fused_problem(parameter.device, parameter.dtype)):
        raise UserError(f"{problem}; or use the backend 'reference'.")
    for part in module.modules():
        if isinstance(part, DeltaResidual):
            part.runtime = part.runtime._replace(backend=backend)
        elif isinstance(part, EmbeddingConvolution | TokenConvolution):
            part.backend = backend


def backend_taken(module: nn.Module, rows: int, *, compiled: bool = False) -> Chosen:
    """What does the work in `module` in a call with so many rows (tokens of all sequences), and why.

    Fused, where a residual or a convolution is.
    """
    found = list[Chosen]()
    for part in module.modules():
        if isinstance(part, DeltaResidual | EmbeddingConvolution | TokenConvolution):
            parameter = next(part.parameters(), None)
            chosen = part.runtime.backend if isinstance(part, DeltaResidual) else part.backend
            if chosen != "auto":
                return Chosen(chosen, "asked for")
            if parameter is not None:
                numbers = rows * part.work.value_channels * part.work.dim
                one = auto(part.work, parameter.device, parameter.dtype, numbers=numbers, compiled=compiled)
                found.append(one)
    return next((one for one in found if one.backend == "fused"), found[0])


def use_memory(module: nn.Module, plan: Plan = "replay", every: int = 8) -> None:
    """Choose what every delta residual in `module` saves of its state for the backward pass (eager mode).

    - save: each state, V times what the additive model saves of its own.
    - replay: every `every`-th state; the others are made again from it, bit for bit as in the forward pass.
    - recover: the last state; each is made from the one after it, which adds rounding errors from layer to layer.

    The last two are for backward(), second derivatives by it included; gradients by torch.func are refused under them.

    Raises:
        UserError: another plan, or every < 1.
    """
    if plan not in ("save", "replay", "recover"):
        raise UserError(f"there is no memory plan '{plan}'; {nearest(plan, ('save', 'replay', 'recover'))}")
    if every < 1:
        raise UserError(f"every must be at least 1, got {every}.")
    for part in module.modules():
        if isinstance(part, DeltaResidual):
            part.runtime = part.runtime._replace(memory=MemoryPlan(plan, every))

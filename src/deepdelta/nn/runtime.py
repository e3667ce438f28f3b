"""How the residuals of a module run: which code does the rewrites, and what is saved for the backward pass."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

from deepdelta.errors import UserError, nearest
from deepdelta.nn.activation_memory import MemoryPlan, Plan
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.parts.compression import TokenConvolution
from deepdelta.nn.parts.expansion import EmbeddingConvolution
from deepdelta.nn.residual import DeltaResidual
from deepdelta.ops.step import NEEDS, fused_problem

Backend = Literal["auto", "reference", "fused"]


class Chosen(NamedTuple):
    backend: str
    """reference or fused."""
    reason: str


def use_backend(module: nn.Module, backend: Backend = "auto", *, compiled: bool = False) -> Chosen:
    """Choose what does the rewrites of every delta residual in `module`, where its parameters are now.

    - reference: plain PyTorch; differentiable any number of times and by torch.func, and what a new residual has.
    - fused: one pass over the state per sublayer, with the next sublayer's compression and norm in it in a GPT and in
      `DeltaStream.chain`; compiled by numba on the CPU and by Triton on CUDA. First derivatives, by backward(); second
      ones, forward-mode ones and torch.func are refused.
    - auto: at V = 1, unless a token compression gains from being fused on the CPU, reference with rule additive, a
      plain addition, and on the CPU in a module that is compiled: there the compiler does as well or better. Elsewhere
      fused where it can run, else reference.

    Args:
        compiled: whether `module` will run under torch.compile; for `auto` alone.

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
    device, problem = parameter.device.type, None
    if backend == "auto":
        problem = _better_as_it_is([part.config for part in residuals], device, compiled)
    if backend != "reference" and problem is None:
        problem = fused_problem(parameter.device, parameter.dtype)
    if backend == "fused" and problem is not None:
        raise UserError(f"{problem}; or use the backend 'reference'.")
    chosen = "fused" if backend != "reference" and problem is None else "reference"
    for part in module.modules():
        if isinstance(part, DeltaResidual):
            part.runtime = part.runtime._replace(fused=chosen == "fused")
        elif isinstance(part, EmbeddingConvolution | TokenConvolution):
            part.fused = chosen == "fused"
    if backend != "auto":
        return Chosen(chosen, "asked for")
    return Chosen(chosen, problem or f"{NEEDS[device]} is installed")


def _better_as_it_is(configs: Sequence[ResidualConfig], device: str, compiled: bool) -> str | None:
    """Why plain PyTorch is at least as fast as a fused step that could run; None where it is not."""
    # The convolutions over tokens are in one pass on the CPU alone.
    if any(config.value_channels > 1 or (device == "cpu" and config.compression == "token") for config in configs):
        return None
    if all(config.rule == "additive" for config in configs):
        return "the rewrite is a plain addition"
    return "compiled for the CPU, V = 1" if compiled and device == "cpu" else None


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

"""The fused step on CUDA: Triton's kernels over torch's memory, compiled once per width, V, dtype and setting.

Bytes per token, with B per number of the state: forward reads X and h and writes X' and c', 2 (V + 1) D B; backward
reads X, h and the two gradients and writes dX and dh, 3 (V + 1) D B. A token that one tile holds (`tiles`) stays in
registers from the first pass over it to the last; a larger one comes from memory for the first pass and from the cache
for the one or two after it. A launch waits for nothing, so the calls of a step may be captured in a CUDA graph.
"""

from functools import cache
from typing import Any

import torch

from deepdelta.ops.backends.cuda import kernels, tiles
from deepdelta.ops.step.arguments import Given, Gradients, Incoming, Known, Made, Replayed, summed


def forward(given: Given, made: Made) -> None:
    """Fill `made` and, with a gating, the write that is given."""
    _launch("forward", given.state.shape[0], given, made)


def backward(given: Given, known: Known, incoming: Incoming, gradients: Gradients) -> Gradients:
    """Fill `gradients`, those of parameters in tensors of their own."""
    tokens, channels, width = given.state.shape
    resident = tiles.blocks("backward", channels, width, given.state.dtype).programs
    # Enough programs to fill the device once; each takes a run of tokens and sums its gradients of the parameters.
    programs = min(tokens, _processors(given.state.device) * resident)
    return summed(
        given,
        gradients,
        lambda parameter: parameter.new_empty(programs, *parameter.shape),
        lambda filled: _launch("backward", programs, given, known, incoming, filled),
    )


def replay(replayed: Replayed) -> None:
    """Fill X + h a^T: X' again, bit for bit, from the a that the forward pass stored."""
    _launch("replay", replayed.state.shape[0], replayed)


def _launch(name: str, programs: int, *records: Any) -> None:
    """Run a kernel, whose arguments are fields of the records by name, and its constants what follows from these."""
    kernel: Any = getattr(kernels, name)
    values = {name: value for record in records for name, value in record._asdict().items()}
    state, erase, gating = values["state"], values.get("erase"), values.get("gating")
    tokens, channels, width = state.shape
    tile = tiles.blocks(name, channels, width, state.dtype)
    values |= {"tokens": tokens, "V": channels, "D": width, "BLOCK_V": tile.channels, "BLOCK_D": tile.width}
    values |= {"OFFSET": values.get("offset"), "POWER": values.get("power"), "EPS": values.get("norm_eps")}
    values["GATES"] = gates = values["gates"] if gating is not None else 0 if erase is None else erase.shape[1]
    values["TARGETS"], values["SHARE"] = 0 if gating is None else gating.shape[1] - gates, values.get("share")
    if tokens:
        with torch.cuda.device(state.get_device()):
            kernel[programs,](**{name: values[name] for name in kernel.arg_names}, num_warps=tile.warps)


@cache
def _processors(device: torch.device) -> int:
    # Triton's interpreter, which runs the same programs one after another on CPU tensors, counts as one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

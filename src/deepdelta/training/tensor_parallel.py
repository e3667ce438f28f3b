"""Attention and MLP split over ranks that take the same rows of a batch (tensor parallelism by DTensor).

Query, key, value, gate and up are split by their outputs, so by heads and hidden features, and the maps back by their
inputs, whose products are summed over the ranks. All else every rank has and computes whole, on the same numbers.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from deepdelta.models import GPT
from deepdelta.models.attention import Attention, SwiGLU


def split(model: GPT, mesh: DeviceMesh) -> None:
    """Split the branches of every layer; heads and the MLP's width must be multiples of the mesh's size."""
    for residual in model.residuals():
        branch = residual.wrapped()
        if isinstance(branch, Attention):
            _split(branch, ("query", "key", "value"), mesh)
            branch.heads //= mesh.size()
            for norm in (branch.query_norm, branch.key_norm):
                for parameter in norm.parameters():
                    parameter.register_hook(_summed)  # type: ignore[no-untyped-call]  # each rank's is of its own heads
        else:
            assert isinstance(branch, SwiGLU)
            _split(branch, ("gate", "up"), mesh)


def _split(branch: nn.Module, inward: tuple[str, ...], mesh: DeviceMesh) -> None:
    # What goes in becomes a DTensor once, so that its gradient is summed over the ranks once.
    same = (Replicate(),)
    parallelize_module(branch, mesh, PrepareModuleInput(input_layouts=same, desired_input_layouts=same))
    out = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
    parallelize_module(branch, mesh, {name: ColwiseParallel() for name in inward} | {"out": out})
    branch.out.register_forward_hook(_whole)  # type: ignore[union-attr]


def _whole(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    """The sum over the ranks. RowwiseParallel's own is a tensor still to be waited for, whose memory fused code would
    read too early."""
    return output.redistribute(placements=[Replicate()]).to_local()  # type: ignore[no-any-return]


def _summed(gradient: Tensor) -> Tensor:
    total = gradient.contiguous().clone()
    dist.all_reduce(total)
    return total

"""A model on several ranks: copies that share the batch (DDP), parts that are whole a layer at a time (FSDP2), or
heads and hidden features (tensor parallelism).

What one process does without is imported where several need it: it takes torch a second.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepdelta.device import Device
from deepdelta.errors import UserError
from deepdelta.models import GPT, LanguageModel
from deepdelta.models.gpt import Layer
from deepdelta.training.config import TrainConfig
from deepdelta.training.optimizer import by_type
from deepdelta.training.ranks import Ranks


def check_parallel(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse settings that do not go with several ranks.

    Raises:
        UserError: the ranks cannot have the same number of rows, or the model cannot be sharded.
    """
    if ranks.started_together and config.parallel == "tensor":
        _check_split(config, ranks.size)
    elif config.batch_size % ranks.size:
        raise UserError(
            f"batch_size must be a multiple of the number of processes, got batch_size={config.batch_size} and "
            f"{ranks.size} processes: it counts the sequences of a micro-batch over all of them."
        )
    if ranks.started_together and config.optimizer == "muon" and config.parallel != "ddp":
        raise UserError(
            f"optimizer='muon' takes whole matrices, which parallel='{config.parallel}' does not have; set "
            "parallel='ddp', or optimizer='adamw'."
        )
    if config.model.rival is None:
        return
    if ranks.started_together and config.parallel != "ddp":
        raise UserError(
            f"parallel='{config.parallel}' shards a GPT's layers; the rival '{config.model.rival}' takes 'ddp'."
        )
    if config.recompute:
        raise UserError(
            f"recompute makes a GPT's layers again; the rival '{config.model.rival}' has none: leave it out."
        )


def _check_split(config: TrainConfig, size: int) -> None:
    model = config.model
    for name, number in (("heads", model.heads), ("mlp_dim", model.mlp_width)):
        if number % size:
            raise UserError(
                f"parallel='tensor' needs model.{name} to be a multiple of the number of processes, got {number} and "
                f"{size} processes."
            )
    if model.repeats is not None:
        raise UserError(
            "parallel='tensor' does not know looped GPTs: leave model.repeats out, or take parallel='fsdp'."
        )
    if config.compile:
        raise UserError("parallel='tensor' does not go with compile: leave it out, or take parallel='fsdp'.")


def claim_device(chosen: Device, ranks: Ranks) -> None:
    """Take the GPU that is this rank's own.

    Raises:
        UserError: there are fewer GPUs than ranks on this machine, or a device on which there can be one rank alone.
    """
    if chosen.device.type == "mps" and ranks.size > 1:
        raise UserError("device 'mps' trains in one process alone; start one, or choose the device cpu.")
    if chosen.device.type == "cuda" and ranks.started_together:
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise UserError(
                f"every process needs a GPU of its own, but of {local + 1} or more on this machine only {there} have "
                "one; start fewer, or choose the device cpu."
            )
        torch.cuda.set_device(local)


def distributed(
    model: LanguageModel, others: Iterable[nn.Module], config: TrainConfig, chosen: Device, ranks: Ranks
) -> nn.Module:
    """What is called for a training step in place of `model`, whose parameters are sharded where the settings say so;
    those of `others`, which are of its kind, too."""
    if not ranks.started_together:
        return model
    if config.parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    for one in (model, *others):
        assert isinstance(one, GPT)
        if config.parallel == "fsdp":
            _shard(one, chosen, ranks)
        else:
            from torch.distributed.device_mesh import init_device_mesh

            from deepdelta.training.tensor_parallel import split

            split(one, init_device_mesh(chosen.device.type, (ranks.size,)))
            one.to(chosen.device)
    return model


def recompute(model: GPT) -> None:
    """Keep of each layer what goes into it, and make the rest again in the backward pass (activation checkpointing)."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _shard(model: GPT, chosen: Device, ranks: Ranks) -> None:
    """FSDP2 layer by layer.

    Under bf16 the matrices of attention and MLP, which autocast would round in any case, are gathered in bf16, and
    their gradients summed in fp32. Gates, directions, reads, norms and embeddings stay in fp32, as in one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(chosen.device.type, (ranks.size,))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for residual in (layer.attention, layer.mlp):
            if chosen.precision == "bf16":
                fully_shard(residual.wrapped(), mesh=mesh, mp_policy=bf16)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def synchronising(forward: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Within it, gradients are summed over the ranks after the last micro-batch of a step alone."""
    module: Any = getattr(forward, "_orig_mod", forward)  # of torch.compile
    if hasattr(module, "set_requires_gradient_sync"):  # sharded
        module.set_requires_gradient_sync(last)
    elif hasattr(module, "no_sync") and not last:  # DistributedDataParallel
        return module.no_sync()  # type: ignore[no-any-return]
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part; every rank must ask for it."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)  # of a DTensor
    return tensor if full is None else full()


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], value: Callable[[str], Tensor], ranks: Ranks) -> None:
    """Set tensors that every rank has whole, by name the same on each, to the values that the first rank has."""
    for name, tensor in tensors.items():
        if not ranks.started_together:
            tensor.copy_(value(name))
            continue
        given = value(name) if ranks.first else torch.empty(tensor.shape)
        full = given.to(tensor.device, tensor.dtype).contiguous()
        dist.broadcast(full, 0)
        local(tensor).copy_(full)


def clip_gradients(model: nn.Module, clip: float) -> Tensor:
    """Scale the gradients so that their norm is at most `clip`; the norm before."""
    apart = by_type(parameter for parameter in model.parameters() if parameter.grad is not None)
    if len(apart) < 2:
        return whole(nn.utils.clip_grad_norm_(model.parameters(), clip))
    norms = [whole(nn.utils.get_total_norm([one.grad for one in some if one.grad is not None])) for some in apart]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    for some in apart:
        nn.utils.clip_grads_with_norm_(some, clip, norm)
    return norm


def local(tensor: Tensor) -> Tensor:
    """What of a tensor this rank holds."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)  # of a DTensor
    return tensor if part is None else part()

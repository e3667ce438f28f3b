"""What a training run will take, before it is begun: memory of a device, speed, hours, and a layout that fits.

Nothing is computed: a model of one and of two layers is run forward and backward on tensors without numbers, with one
sequence and with two, and what each further layer and sequence adds is added up.

- state of a device: fp32 parameters, gradients and AdamW's two moments, and bf16 copies of the parameters;
- activations: what plain PyTorch saves for the backward pass, and the gradient of the logits, of many logits those that
  stand at one time. The fused step with a memory plan saves less;
- seconds per token: matrix FLOPs / (`COMPUTE` x the GPU's peak) + bytes / (`MEMORY` x its bandwidth) + bytes of
  convolutions / (`CONVOLUTION` x its bandwidth), the bytes being those that the operators without a matrix product
  read and write, one by one. The three shares are fitted on the authors' figures (docs/planning.md), so they hold for
  code like theirs; communication is taken to be hidden behind the computation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepdelta.errors import UserError, nearest
from deepdelta.models import GPT, GPTConfig, language_model, logits_at_once, parameter_shapes
from deepdelta.models.flops import training_flops_per_token
from deepdelta.nn import use_backend
from deepdelta.training.config import TrainConfig

COMPUTE, MEMORY, CONVOLUTION = 0.58, 1.64, 0.108
"""Shares of a GPU's peak and bandwidth. Above 1: compiled code moves fewer bytes than operators one by one."""
USABLE = 0.9
"""The share of a device's memory that is planned with; the rest is the allocator's, the driver's and NCCL's."""

Name = Literal["DDP", "FSDP", "FSDP, checkpointed layers"]


class Gpu(NamedTuple):
    """The vendor's figures of one device."""

    memory: float
    """Bytes."""
    peak: float
    """Dense bf16 operations per second."""
    bandwidth: float
    """Bytes per second."""


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100": Gpu(80e9, 312e12, 2.04e12),
        "h100": Gpu(80e9, 989e12, 3.35e12),
        "h200": Gpu(141e9, 989e12, 4.8e12),
        "b200": Gpu(180e9, 2250e12, 7.7e12),
    }
)


def gpu_named(name: str) -> Gpu:
    """
    Raises:
        UserError: there is none; the nearest is named.
    """
    if name not in GPUS:
        raise UserError(f"there is no GPU '{name}'; {nearest(name, GPUS)}")
    return GPUS[name]


class Bytes(NamedTuple):
    """Of one token's training: held at the peak, moved by operators, and by convolutions."""

    held: float
    moved: float
    convolved: float

    def plus(self, other: "Bytes", times: float = 1) -> "Bytes":
        return Bytes(*(a + times * b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run lies on its devices; bytes of one device."""

    name: Name
    batch_size: int
    """Sequences of a micro-batch."""
    accumulate: int
    state: int
    """Parameters, gradients, optimiser, bf16 copies, and of FSDP the layers that are gathered."""
    activations: int


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run takes."""

    parameters: int
    optimizer_bytes: int
    """Of all devices together, if nothing is held twice."""
    flops_per_token: int
    """Of the products, forward and backward (`deepdelta.models.flops`)."""
    bytes_per_token: float
    """Moved by everything else."""
    activation_bytes_per_token: float
    layout: Layout
    tokens_per_second: float
    """Of all devices together."""
    hours: float


def outlook(config: TrainConfig, gpu: Gpu, gpus: int) -> Outlook:
    """What the run takes on so many devices; the first layout that fits, of DDP, FSDP and FSDP with checkpoints.

    Raises:
        UserError: the devices do not share a step's sequences evenly, or no layout fits.
    """
    sequences = config.batch_size * config.accumulate
    if gpus < 1 or sequences % gpus:
        raise UserError(f"gpus must divide the {sequences} sequences of a step, got {gpus}; give another number.")
    model = config.model
    shapes = parameter_shapes(model)
    parameters = sum(map(prod, shapes.values()))
    counted, flops = bytes_per_token(model), 3 * training_flops_per_token(model).matrix_forward
    layout = fitting(model, gpu, gpus, sequences // gpus, parameters, counted.held)
    work = flops * (4 / 3 if layout.name == "FSDP, checkpointed layers" else 1)
    speed = gpus / seconds_per_token(gpu, work, counted)
    return Outlook(
        parameters=parameters,
        optimizer_bytes=8 * parameters + 4 * len(shapes),
        flops_per_token=flops,
        bytes_per_token=counted.moved + counted.convolved,
        activation_bytes_per_token=counted.held,
        layout=layout,
        tokens_per_second=speed,
        hours=config.steps * config.tokens_per_step / speed / 3600,
    )


def seconds_per_token(gpu: Gpu, flops: float, counted: Bytes) -> float:
    """The roofline, of one device."""
    moving = counted.moved / MEMORY + counted.convolved / CONVOLUTION
    return flops / (COMPUTE * gpu.peak) + moving / gpu.bandwidth


def fitting(model: GPTConfig, gpu: Gpu, gpus: int, sequences: int, parameters: int, held: float) -> Layout:
    """The first layout of which a device's memory holds the state and the largest micro-batch that it can.

    A number takes 16 bytes (fp32 parameter, gradient, two moments) and 2 as a bf16 copy. FSDP shards the 16, and holds
    two layers and the embedding gathered in bf16, with their gradients. With checkpoints a layer's input state is
    saved, and all of it for one layer at a time; the logits stay, where they are many those of a part of the tokens
    (`deepdelta.models.gpt.head_loss`).
    """
    layer, embedding = layer_parameters(model)
    state_bytes = 4 * model.residual.value_channels * model.dim
    logits = held_outside_layers(model)
    checkpointed = model.depth * state_bytes + (held - logits) / model.depth + logits
    sharded = 16 * parameters / gpus + 4 * (2 * layer + embedding)
    options: list[tuple[Name, float, float]] = [
        ("DDP", 18 * parameters, held),
        ("FSDP", sharded, held),
        ("FSDP, checkpointed layers", sharded, checkpointed),
    ]
    room = USABLE * gpu.memory
    for name, state, per_token in options:

        def activations(batch: int, per_token: float = per_token) -> float:
            tokens, vocabulary = batch * model.context, model.vocab_size
            assert vocabulary is not None
            return tokens * (per_token - logits) + logits * logits_at_once(tokens, vocabulary) / vocabulary

        for batch in (size for size in range(sequences, 0, -1) if sequences % size == 0):
            if state + activations(batch) <= room:
                return Layout(
                    name=name,
                    batch_size=batch,
                    accumulate=sequences // batch,
                    state=round(state),
                    activations=round(activations(batch)),
                )
    needed = (state + activations(1)) / 1e9
    raise UserError(
        f"the state and one sequence must fit into {room / 1e9:.0f} GB of a device: {needed:.0f} "
        "GB are needed even sharded and with checkpoints; give more gpus, a larger gpu, or a smaller model."
    )


def layer_parameters(model: GPTConfig) -> tuple[int, int]:
    """Numbers of one further layer, and of the embedding."""
    one, two = (sum(map(prod, parameter_shapes(replace(model, layers=n)).values())) for n in (1, 2))
    assert model.vocab_size is not None
    return two - one, model.vocab_size * model.dim


def bytes_per_token(model: GPTConfig, *, autocast: bool = True) -> Bytes:
    """Bytes of a training step per token of a full context, in bf16 as training on a GPU is, or all in fp32."""
    first, layer = _of_layers(model, autocast)
    return first.plus(layer, model.layers - 1)


def held_outside_layers(model: GPTConfig) -> float:
    """Of the bytes held per token, those that stand once whatever the number of layers: the head's and the loss's."""
    first, layer = _of_layers(model, True)
    return first.held - layer.held


@cache
def _of_layers(model: GPTConfig, autocast: bool) -> tuple[Bytes, Bytes]:
    """Bytes per token of a model of one layer, and of each layer more; what a step takes once is left out."""
    one, two = (
        _step(small, 2, autocast).plus(_step(small, 1, autocast), -1)
        for small in (replace(model, layers=1), replace(model, layers=2))
    )
    assert model.vocab_size is not None, "the operations of the head are counted"
    per_token, logits = 1 / model.context, Bytes(6 * model.vocab_size, 0, 0)  # in fp32 and cast to bf16
    return logits.plus(one, per_token), Bytes(0, 0, 0).plus(two.plus(one, -1), per_token)


def _step(config: GPTConfig, batch: int, autocast: bool) -> Bytes:
    """Forward and backward of `batch` sequences, without numbers."""
    with torch.device("meta"):
        model = language_model(config)
    if isinstance(model, GPT):
        use_backend(model, "reference")
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape))
        ids = torch.zeros(batch, config.context, dtype=torch.long)
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[id(storage)] = storage
            return tensor

        with _Traffic() as traffic:
            with (
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
                saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                loss = model(ids, ids).loss
            loss.backward()
        return Bytes(sum(storage.nbytes() for storage in kept.values()), traffic.moved, traffic.convolved)


class _Traffic(TorchDispatchMode):
    """Bytes that operators read and write; views move nothing, products are counted as operations."""

    PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm"))

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = self.convolved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not isinstance(function, torch._ops.OpOverload) or function.namespace != "aten" or function.is_view:
            return result
        if name in self.PRODUCTS or "attention" in name or name.startswith(("empty", "new_empty", "_unsafe_view")):
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if "convolution" in name:
            self.convolved += size
        else:
            self.moved += size
        return result

"""torchvision's ResNets: a channel-first state (N, V, C, H, W) from the stem to the pooling.

The ReLU after an addition acts on each value channel. Where a block changes width or resolution, its shortcut map does
so too, and the state goes on in a stream of the new width; the branch reads the state as it was before. The branch has
no norm at its beginning, so the residual's own is for the gate and W alone, which see the state at unit mean square.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from deepdelta.errors import UserError
from deepdelta.retrofitting.blocks import DeltaBlock, Deltas, Job, check_blocks
from deepdelta.retrofitting.describing import full_name


class ResNetBlock(DeltaBlock):
    """A block with a delta residual in place of its addition."""

    RESIDUALS = ("convolutions",)
    relu: nn.Module
    downsample: nn.Module | None

    def branch(self, x: Tensor) -> Tensor:
        """The block without its addition and the ReLU after that."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        state = self.delta.enter(x)
        x_in = None
        if self.downsample is not None:
            before = self.delta.before
            assert before is not None
            x_in = before.reduce(state)
            state = before.map_channels(self.downsample, state)
        opening = self.delta.open("convolutions", state, self.delta.reading("convolutions"))
        new = opening.rewrite(self.branch(opening.x_in() if x_in is None else x_in))
        # The block's own ReLU works in place, on what the backward pass may still need.
        return self.delta.leave(torch.relu(new) if isinstance(self.relu, nn.ReLU) else self.relu(new))


class BasicBlock(ResNetBlock):
    """Two convolutions, as in ResNet-18 and -34."""

    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


class Bottleneck(ResNetBlock):
    """Three convolutions, as in ResNet-50 and deeper, ResNeXt and Wide ResNet."""

    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    conv3: nn.Module
    bn3: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(x))  # type: ignore[no-any-return]


OPTIONS: dict[str, Any] = {"channel_first": True, "norm": "rms"}
BLOCKS: dict[str, type[DeltaBlock]] = {
    "torchvision.models.resnet.BasicBlock": BasicBlock,
    "torchvision.models.resnet.Bottleneck": Bottleneck,
}


def retrofit_resnet(network: nn.Module, job: Job) -> None:
    """Convert every block of a torchvision ResNet."""
    stages = [network.get_submodule(f"layer{i}") for i in range(1, 5)]
    for number, stage in enumerate(stages, 1):
        if not isinstance(stage, nn.Sequential):
            raise UserError(
                f"retrofit needs layer1 to layer4 of a ResNet to be nn.Sequential of blocks, and layer{number} is a "
                f"{type(stage).__name__}; wrap the branches with deepdelta.DeltaStream."
            )
    blocks = [block for stage in stages for block in cast(nn.Sequential, stage)]
    check_blocks(network, blocks, BLOCKS)
    entry = stream = job.stream(_convolution(blocks[0], "conv1").in_channels, **OPTIONS)
    for i, block in enumerate(blocks):
        version = BLOCKS[full_name(type(block))]
        before = None
        if block.downsample is not None:
            last = "conv2" if version is BasicBlock else "conv3"
            before, stream = stream, job.stream(_convolution(block, last).out_channels, **OPTIONS)
        deltas = Deltas(
            {"convolutions": stream.wrap()},
            entry=entry if i == 0 else None,
            stream=stream if i == len(blocks) - 1 else None,
            before=before,
        )
        job.convert(block, version, deltas)
    job.hook(network.get_submodule("avgpool").register_forward_pre_hook(refuse_open_state))


def refuse_open_state(pool: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Hook before the pooling: the state ends in the last block, so that must have run.

    Raises:
        UserError: it has not.
    """
    if args[0].ndim > 4:
        raise UserError(
            "a retrofitted ResNet must run its last block, which ends the state, and that is gone; undo_retrofit "
            "before you take blocks out."
        )


def _convolution(block: nn.Module, name: str) -> nn.Conv2d:
    return cast(nn.Conv2d, block.get_submodule(name))

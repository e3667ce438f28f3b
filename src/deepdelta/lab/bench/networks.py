"""Small networks as people have them, plain and around a stream: an MLP, a CNN and an encoder the size of digits.

The plain one is x + branch(norm(x)) in PyTorch and nothing else. Shapes: B images, C channels, H height, W width, T
patches, D width.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepdelta.lab.layers import ChannelNorm, SelfAttention
from deepdelta.nn import DeltaStream, ResidualConfig

NetworkName = Literal["mlp", "cnn", "encoder"]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)
IMAGE, CLASSES, HEADS = 8, 10, 4


class SmallNetwork(nn.Module):
    """mlp: all pixels, a hidden layer of four times the width per branch. cnn: a 3 x 3 convolution, two with ReLU per
    branch, mean over pixels. encoder: 2 x 2 patches, attention and MLP in turn, mean over patches."""

    def __init__(self, kind: NetworkName, dim: int, depth: int, residual: ResidualConfig | None) -> None:
        super().__init__()
        self.kind = kind
        entries: dict[NetworkName, Callable[[], nn.Module]] = {
            "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(IMAGE * IMAGE, dim)),
            "cnn": lambda: nn.Conv2d(1, dim, 3, padding=1),
            "encoder": lambda: nn.Conv2d(1, dim, 2, stride=2),
        }
        self.inward = entries[kind]()
        branches = [_branch(kind, index, dim) for index in range(depth)]
        self.stream: DeltaStream | None = None
        if residual is None:
            self.blocks: nn.Module = nn.Sequential(*(Plain(branch, _norm(kind, dim)) for branch in branches))
        else:
            self.stream = DeltaStream(dim, seed=0, channel_first=kind == "cnn", **vars(residual))
            self.blocks = self.stream.chain([self.stream.wrap(branch) for branch in branches])
        self.outward = nn.Linear(dim, CLASSES)

    def forward(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B classes"]:
        x = self.inward(images)
        if self.kind == "encoder":
            x = x.flatten(2).mT
        x = self.blocks(x) if self.stream is None else self.stream.reduce(self.blocks(self.stream.expand(x)))
        over = {"mlp": (), "cnn": (-2, -1), "encoder": (-2,)}[self.kind]
        logits: Tensor = self.outward(x.mean(over) if over else x)
        return logits


class Plain(nn.Module):
    def __init__(self, branch: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.branch, self.norm = branch, norm

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return x + self.branch(self.norm(x))  # type: ignore[no-any-return]


def _norm(kind: NetworkName, dim: int) -> nn.Module:
    return (ChannelNorm if kind == "cnn" else nn.RMSNorm)(dim, 1e-5)


def _branch(kind: NetworkName, index: int, dim: int) -> nn.Module:
    if kind == "cnn":
        return nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))
    if kind == "encoder" and index % 2 == 0:
        return SelfAttention(dim, HEADS, bias=True)
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))


def images_and_labels(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, IMAGE, IMAGE, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)

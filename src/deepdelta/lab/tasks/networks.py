"""Ordinary networks with PyTorch's own starts: an MLP, a CNN and an encoder on scikit-learn's digits, at several rates.

What someone does first who has a network: every x + F(x) gives way to a stream's residual and nothing else is touched.
Shapes: B images, C channels, H height, W width, T patches, D width.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.config import Count, Distinct
from deepdelta.errors import UserError, nearest
from deepdelta.lab.layers import ChannelNorm, SelfAttention
from deepdelta.lab.tasks import fitting
from deepdelta.lab.tasks.fitting import AdamW, part_of, seeded, stream_of, with_norm
from deepdelta.lab.tasks.images import load_images, split_images
from deepdelta.lab.tasks.task import Progress, Task, Variant
from deepdelta.lab.tasks.vision import fit_images
from deepdelta.nn import ResidualConfig
from deepdelta.training.config import Positive

NETWORKS = ("mlp", "cnn", "encoder")


@dataclass(frozen=True, kw_only=True)
class NetworksSettings(AdamW):
    """Sizes of the networks and the recipe; a condition changes `residual` and `out_norm` alone."""

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    out_norm: Positive | None = None
    """RMSNorm of what each branch returns, its weight starting at this number; None: no norm."""
    networks: Annotated[tuple[str, ...], Distinct] = NETWORKS
    rates: Annotated[tuple[Positive, ...], Distinct] = (1e-3, 3e-3, 1e-2)
    """Every network is trained at each of these, in place of `lr`."""
    test_share: float = 0.4
    depth: Count = 4
    """Residuals."""
    dim: Annotated[int, Ge(4)] = 64
    """Width of the MLP; the encoder has half of it, the CNN a quarter."""
    steps: Count = 300
    batch_size: Count = 64
    lr: Positive = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for network in self.networks:
            if network not in NETWORKS:
                raise UserError(f"there is no network '{network}'; {nearest(network, NETWORKS)}")


class Network(nn.Module):
    """Images in, `depth` residuals, classes out; every layer but the stream's starts as PyTorch starts it.

    mlp: all pixels, a hidden layer of twice the width per branch. cnn: a 3 x 3 convolution, two with ReLU per branch,
    mean over pixels; channel-first. encoder: 2 x 2 patches with learned positions, attention and MLP in turn, mean over
    patches.
    """

    def __init__(self, kind: str, settings: NetworksSettings, classes: int, size: int, seed: int) -> None:
        super().__init__()
        self.kind, dim = kind, settings.dim // {"mlp": 1, "encoder": 2, "cnn": 4}[kind]
        if kind == "mlp":
            self.inward: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(size * size, dim))
        else:
            self.inward = nn.Conv2d(1, dim, 3, padding=1) if kind == "cnn" else nn.Conv2d(1, dim, 2, stride=2)
        if kind == "encoder":
            self.positions = nn.Parameter(0.02 * torch.randn((size // 2) ** 2, dim))
        self.stream = stream_of(settings.residual, dim, seed, channel_first=kind == "cnn")
        self.blocks = nn.Sequential(
            *(self.stream.wrap(_branch(kind, index, dim, settings.out_norm)) for index in range(settings.depth))
        )
        self.outward = nn.Linear(dim, classes)

    def forward(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B classes"]:
        x = self.inward(images)
        if self.kind == "encoder":
            x = x.flatten(2).mT + self.positions
        x = self.stream.reduce(self.blocks(self.stream.expand(x)))
        over = {"mlp": (), "cnn": (-2, -1), "encoder": (-2,)}[self.kind]
        logits: Tensor = self.outward(x.mean(over) if over else x)
        return logits


def _branch(kind: str, index: int, dim: int, out_norm: float | None) -> nn.Module:
    if kind == "cnn":
        layers = [nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1)]
    elif kind == "encoder" and index % 2 == 0:
        layers = [SelfAttention(dim, 4)]
    else:
        layers = [nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim)]
    return with_norm(nn.Sequential(*layers), ChannelNorm(dim) if kind == "cnn" else nn.RMSNorm(dim), out_norm)


def run(settings: NetworksSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train every network at every rate and test it on the images held out.

    Returns:
        log_loss: the mean over networks and rates of ln(test loss), the test loss a cross-entropy in nats per image, so
        that a difference d is a ratio exp(d) of geometric means; loss_NETWORK_lrR and accuracy_NETWORK_lrR of each.

    Raises:
        Diverged: the loss of a network is no longer a finite number.
    """
    train, test = split_images(load_images("digits"), settings.test_share, seed)
    points = [(kind, rate) for kind in settings.networks for rate in settings.rates]
    found: dict[str, float] = {}
    for number, (kind, rate) in enumerate(points):
        with seeded(seed):
            network = Network(kind, settings, train.classes, train.pixels.shape[-1], seed)
        fit_images(network, train, replace(settings, lr=rate), seed, part_of(progress, number, len(points)))
        with torch.no_grad():
            logits = network(test.pixels)
        name = f"{kind}_lr{rate:g}"
        found[f"loss_{name}"] = F.cross_entropy(logits, test.labels).item()
        found[f"accuracy_{name}"] = (logits.argmax(-1) == test.labels).float().mean().item()
    losses = [loss for name, loss in found.items() if name.startswith("loss_")]
    return {"log_loss": sum(map(math.log, losses)) / len(losses), **found}


CONDITIONS = {
    "additive": fitting.CONDITIONS["additive"],
    "bare": Variant(
        summary="x + F(x), no norm at all",
        changes={"residual": {"rule": "additive", "value_channels": 1, "norm": "none"}},
    ),
    "normed": fitting.NORMED,
    "default-1": Variant(
        summary="the default at V = 1: an erase that starts closed",
        changes={"residual": {"rule": "additive_erase", "plain_start": True, "value_channels": 1}},
    ),
    "default-4-write-only": Variant(
        summary="the default at V = 4 without its erase",
        changes={
            "residual": {
                "rule": "additive_erase",
                "plain_start": True,
                "value_channels": 4,
                "gate": "constant",
                "erase_init": 0.0,
            }
        },
    ),
    "default-4": replace(fitting.DEFAULT_4, control="default-4-write-only"),
    "write-only-4": Variant(
        summary="a gated linear target is written, nothing is erased, V = 4",
        changes={"residual": {"rule": "write_only", "value_channels": 4}},
        control="normed",
    ),
    "delta-1": replace(fitting.CONDITIONS["delta"], control="normed"),
    "delta-4": fitting.CONDITIONS["delta-4"],
}

TASK = Task(
    settings=NetworksSettings(),
    conditions=CONDITIONS,
    baseline="additive",
    primary="log_loss",
    unit="ln of the test loss in nats per image",
    higher_is_better=False,
    run=run,
    replaced={"lr": "rates"},
)

"""A small vision transformer and a small ResNet, their residuals made by the stream that users get.

Shapes: B images, C channels, H height, W width, T patches, V value channels, D width.
"""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.errors import UserError
from deepdelta.lab.layers import SelfAttention
from deepdelta.lab.tasks.fitting import Recipe, fit, stream_of
from deepdelta.lab.tasks.images import Images
from deepdelta.lab.tasks.task import Progress
from deepdelta.nn import DeltaStream, ResidualConfig

MODELS = ("vit", "resnet")


def _check_images(images: Tensor, image: tuple[int, int, int]) -> None:
    if images.shape[1:] != image:
        raise UserError(
            f"images must be (B, channels, height, width) = (B, {', '.join(map(str, image))}), as the network was made "
            f"for, got {tuple(images.shape)}."
        )


class ViT(nn.Module):
    """Patches with learned positions, `depth` blocks of an attention and an MLP residual, mean over patches, head.

    Raises:
        UserError: the patches do not cover the image, or the heads do not divide the width; forward: images of another
            size.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        residual: ResidualConfig,
        *,
        depth: int,
        dim: int,
        heads: int,
        patch: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.image = image
        channels, height, width = image
        if height % patch or width % patch:
            raise UserError(
                f"images must be whole numbers of patches high and wide, got {height} x {width} with patch={patch}: "
                "change patch, or scale the images of a folder with image_size."
            )
        if dim % heads:
            raise UserError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}.")
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((height // patch) * (width // patch), dim))
        self.stream = stream_of(residual, dim, seed)
        self.blocks = nn.Sequential()
        for _ in range(depth):
            self.blocks.append(self.stream.wrap(SelfAttention(dim, heads)))
            mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            self.blocks.append(self.stream.wrap(mlp))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        _check_images(images, self.image)
        x_BTD = self.patches(images).flatten(2).mT + self.positions
        x_BTD = self.stream.reduce(self.blocks(self.stream.expand(x_BTD)))
        logits: Tensor = self.head(self.norm(x_BTD).mean(1))
        return logits


class ResNet(nn.Module):
    """Two stages of residuals around two 3 x 3 convolutions each, the second half as fine and twice as wide.

    States are channel-first, (B, V, D, H, W), and every pixel has its own direction, target and gate.

    Raises:
        UserError: images of fewer than 4 pixels in height or width, or fewer than two residuals; forward: images of
            another size.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        residual: ResidualConfig,
        *,
        depth: int,
        dim: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.image = image
        channels, height, width = image
        if min(height, width) < 4:
            raise UserError(f"the ResNet needs images of at least 4 x 4 pixels, got {height} x {width}.")
        if depth < 2:
            raise UserError(f"the ResNet has two stages, so depth must be at least 2, got {depth}.")
        first = (depth + 1) // 2
        self.stem = nn.Conv2d(channels, dim, 3, padding=1, bias=False)
        streams = [
            stream_of(residual, width, 2 * seed + i, channel_first=True) for i, width in enumerate((dim, 2 * dim))
        ]
        self.streams = nn.ModuleList(streams)
        self.stages = nn.ModuleList(
            nn.Sequential(*(stream.wrap(_convolutions(stream.dim)) for _ in range(count)))
            for stream, count in zip(streams, (first, depth - first), strict=True)
        )
        self.between = nn.Sequential(nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1))
        self.norm = nn.BatchNorm2d(2 * dim)
        self.head = nn.Linear(2 * dim, classes)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        _check_images(images, self.image)
        x_BDHW = self.stem(images)
        for number, (stream, stage) in enumerate(zip(self.streams, self.stages, strict=True)):
            assert isinstance(stream, DeltaStream)
            x_BDHW = stream.reduce(stage(stream.expand(x_BDHW)))
            if number == 0:
                x_BDHW = self.between(x_BDHW)
        logits: Tensor = self.head(self.norm(x_BDHW).relu().mean((-2, -1)))
        return logits


def _convolutions(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
    )


def fit_images(network: nn.Module, images: Images, recipe: Recipe, seed: int, progress: Progress) -> None:
    """Minimise the cross-entropy over batches of images that are drawn by the seed.

    Raises:
        Diverged: see `fit`.
    """
    generator = Generator().manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(images.labels), (recipe.batch_size,), generator=generator)
        return F.cross_entropy(network(images.pixels[rows]), images.labels[rows])

    fit(network, loss_of, recipe, progress)

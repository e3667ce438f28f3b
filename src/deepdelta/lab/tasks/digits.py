"""Images: accuracy of a small vision transformer and a small ResNet against training-set size and against depth.

scikit-learn's digits (1,797 images of 8 x 8 pixels) by default, where the full set saturates; `source` takes folders of
images and torchvision's data sets for real runs.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import nn

from deepdelta.config import Count, Distinct
from deepdelta.errors import UserError, nearest
from deepdelta.lab.tasks.fitting import CONDITIONS, AdamW, part_of, seeded
from deepdelta.lab.tasks.images import Images, load_images, split_images
from deepdelta.lab.tasks.task import Progress, Task
from deepdelta.lab.tasks.vision import MODELS, ResNet, ViT, fit_images
from deepdelta.nn import ResidualConfig
from deepdelta.training.config import Positive


@dataclass(frozen=True, kw_only=True)
class DigitsSettings(AdamW):
    """The images, the sizes of the networks and the recipe; a condition changes `residual` alone.

    One network per model is trained at every training-set size with the first depth, and at every other depth with the
    first size.
    """

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    source: str = "digits"
    """digits, folder:PATH (a folder of images per class) or torchvision:NAME."""
    root: str = "data"
    """Where a data set of torchvision lies."""
    download: bool = False
    """Let torchvision fetch what is not there."""
    image_size: Count | None = None
    """Height and width that images of a folder are scaled to."""
    test_share: float = 0.4
    models: Annotated[tuple[str, ...], Distinct] = MODELS
    train_images: Annotated[tuple[Annotated[int, Ge(2)], ...], Distinct] = (200, 50, 800)
    depths: Annotated[tuple[Count, ...], Distinct] = (2, 8)
    """Blocks: of two residuals in the transformer, of one in the ResNet."""
    dim: Annotated[int, Ge(2)] = 32
    """Width of the transformer; half of it is the width of the ResNet's first stage."""
    heads: Count = 4
    patch: Count = 2
    """Height and width of the transformer's patches in pixels."""
    steps: Count = 400
    batch_size: Count = 32
    lr: Positive = 3e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for model in self.models:
            if model not in MODELS:
                raise UserError(f"there is no model '{model}'; {nearest(model, MODELS)}")

    def points(self) -> list[tuple[str, int, int]]:
        """(model, training images, depth) of every network that a run trains."""
        size, depth = self.train_images[0], self.depths[0]
        pairs = [(images, depth) for images in self.train_images] + [(size, other) for other in self.depths[1:]]
        return [(model, *pair) for model in self.models for pair in pairs]


def build(settings: DigitsSettings, model: str, images: Images, depth: int, seed: int) -> nn.Module:
    """An untrained network for these images."""
    channels, height, width = images.pixels.shape[1:]
    image, dim = (channels, height, width), settings.dim
    with seeded(seed):
        if model == "resnet":
            return ResNet(image, images.classes, settings.residual, depth=depth, dim=dim // 2, seed=seed)
        return ViT(
            image,
            images.classes,
            settings.residual,
            depth=depth,
            dim=dim,
            heads=settings.heads,
            patch=settings.patch,
            seed=seed,
        )


def run(settings: DigitsSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train every network and test it on the images held out.

    Returns:
        accuracy: the mean of the following; accuracy_MODEL_nN_dD: fraction of right labels on the test images of the
        model of depth D trained on N images.

    Raises:
        UserError: the source cannot be read, or has too few images.
    """
    images = load_images(settings.source, root=settings.root, size=settings.image_size, download=settings.download)
    train, test = split_images(images, settings.test_share, seed)
    if len(train.labels) < max(settings.train_images):
        raise UserError(
            f"train_images must be at most the {len(train.labels)} images that are not for testing, got "
            f"{max(settings.train_images)}: lower it or test_share."
        )
    points = settings.points()
    networks = [build(settings, model, images, depth, seed) for model, _, depth in points]
    found = {}
    for number, ((model, count, depth), network) in enumerate(zip(points, networks, strict=True)):
        shown = Images(train.pixels[:count], train.labels[:count], train.classes)
        fit_images(network, shown, settings, seed, part_of(progress, number, len(points)))
        found[f"accuracy_{model}_n{count}_d{depth}"] = accuracy(network, test)
    return {"accuracy": sum(found.values()) / len(found), **found}


@torch.no_grad()
def accuracy(network: nn.Module, images: Images) -> float:
    """Fraction of right labels."""
    guesses = torch.cat([network(pixels).argmax(-1) for pixels in torch.split(images.pixels, 256)])
    return (guesses == images.labels).float().mean().item()


TASK = Task(
    settings=DigitsSettings(),
    conditions=CONDITIONS,
    baseline="additive",
    primary="accuracy",
    unit="fraction of test images",
    higher_is_better=True,
    run=run,
)

"""Images with labels: scikit-learn's digits, a folder per class, or a data set of torchvision that lies on the disk.

Shapes: N images, C channels, H height, W width.
"""

import fcntl
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Generator, Tensor

from deepdelta.errors import UserError, nearest
from deepdelta.releases import check_tested

TORCHVISION = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Images(NamedTuple):
    pixels: Float[Tensor, "N C H W"]
    """In [0, 1]."""
    labels: Int[Tensor, " N"]
    """In 0 .. classes - 1."""
    classes: int


def load_images(source: str, *, root: str = "data", size: int | None = None, download: bool = False) -> Images:
    """All images of a source.

    Args:
        source: digits; folder:PATH, where PATH/CLASS/ holds the images of a class; torchvision:NAME.
        root: where torchvision's data set lies.
        size: height and width that images of a folder are scaled to; None: they must be of one size.
        download: let torchvision fetch a data set that is not there.

    Raises:
        UserError: an unknown source, one that is not there, unreadable images, sizes that differ, or labels that name
            no class.
    """
    kind, _, name = source.partition(":")
    if size is not None and kind != "folder":
        raise UserError(f"only the images of a folder are scaled: leave image_size out for source '{source}'.")
    if source == "digits":
        check_tested("scikit_learn")
        pixels, labels = load_digits(return_X_y=True)
        return checked(torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels), 10)
    if kind == "folder" and name:
        return _folder(Path(os.path.expanduser(name)), size)
    if kind == "torchvision" and name:
        return _torchvision(name, root, download)
    raise UserError(f"source must be digits, folder:PATH or torchvision:NAME, got '{source}'.")


def checked(pixels: Tensor, labels: Tensor, classes: int) -> Images:
    """The images, if they are (N, C, H, W) with one label each, in 0 .. classes - 1."""
    if pixels.ndim != 4 or len(pixels) != len(labels) or not len(labels):
        raise UserError(
            f"images must be (N, channels, height, width) with one label each, at least one, got shape "
            f"{tuple(pixels.shape)} and {len(labels)} labels."
        )
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise UserError(
            f"labels must lie in 0 .. {classes - 1} for {classes} classes, got {int(labels[first])} at image {first}."
        )
    return Images(pixels, labels.long(), classes)


def split_images(images: Images, test_share: float, seed: int) -> tuple[Images, Images]:
    """Two disjoint parts, for training and for testing, standardised by the first one's mean and deviation.

    Raises:
        UserError: one of them is empty.
    """
    count = len(images.labels)
    tests = round(count * test_share) if math.isfinite(test_share) else 0
    if not 0 < tests < count:
        raise UserError(f"test_share must leave images on both sides, got {test_share} of {count} images.")
    order = torch.randperm(count, generator=Generator().manual_seed(seed))
    train, test = order[tests:], order[:tests]
    mean, std = (f(images.pixels[train].movedim(1, 0).flatten(1), dim=1) for f in (torch.mean, torch.std))
    pixels = (images.pixels - mean[:, None, None]) / (std[:, None, None] + 1e-6)
    return (
        Images(pixels[train], images.labels[train], images.classes),
        Images(pixels[test], images.labels[test], images.classes),
    )


def _folder(path: Path, size: int | None) -> Images:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UserError(
            f"folders of images need the package pillow ({error}): install it with pip install pillow."
        ) from None
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    if not classes:
        raise UserError(f"folder:PATH must name a folder with a folder of images per class, got {path}.")
    arrays: list[Any] = []
    labels: list[int] = []
    first = None
    for label, folder in enumerate(classes):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"every class needs images ({', '.join(SUFFIXES)}), there are none in {folder}.")
        for file in files:
            try:
                with Image.open(file) as opened:
                    image = opened.convert("RGB")
            except (UnidentifiedImageError, OSError) as error:
                raise UserError(f"{file} is no image that can be read ({error}); remove it.") from None
            if size is not None:
                image = image.resize((size, size))
            first = first or (image.size, file)
            if image.size != first[0]:
                raise UserError(
                    f"all images must be of one size, got {_size(first[0])} in {first[1]} and {_size(image.size)} in "
                    f"{file}: set image_size to scale them."
                )
            arrays.append(np.asarray(image))
            labels.append(label)
    pixels = torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float() / 255
    return checked(pixels, torch.tensor(labels), len(classes))


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _torchvision(name: str, root: str, download: bool) -> Images:
    if name not in TORCHVISION:
        raise UserError(f"there is no torchvision data set '{name}' here; {nearest(name, TORCHVISION)}")
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torchvision:{name} needs the package torchvision, and beside it the build of torch that it was made for "
            f"({error}): install both as PyTorch's install page says, or give a folder of images."
        ) from None
    try:
        with ExitStack() as held:
            if download:
                # Of several runs side by side one fetches; the others find what is there.
                Path(root).mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((Path(root) / f".{name}.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            parts = [getattr(datasets, name)(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"torchvision's {name} cannot be had from root '{root}' ({error}); it is fetched only with download=true."
        ) from None
    pixels = torch.cat([torch.as_tensor(part.data) for part in parts])
    labels = torch.cat([torch.as_tensor(part.targets) for part in parts])
    if labels.ndim == 2:  # QMNIST: the first number of many is the digit
        labels = labels[:, 0]
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.movedim(-1, 1)
    return checked(pixels.float() / 255, labels, len(parts[0].classes))

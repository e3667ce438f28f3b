"""The images task: sources against what lies on the disk, networks against formulas, errors, and learning."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from deepdelta import ResidualConfig, UserError
from deepdelta.lab.layers import SelfAttention
from deepdelta.lab.tasks import load_task
from deepdelta.lab.tasks.digits import DigitsSettings, build
from deepdelta.lab.tasks.images import Images, checked, load_images, split_images
from deepdelta.lab.tasks.vision import ResNet, ViT
from helpers import near, perturb, randn
from torchvision_beside_cpu_torch import models as torchvision_models

TASK = load_task("digits")
TINY = {"train_images": [40, 20], "depths": [2, 3], "dim": 8, "heads": 2, "steps": 2, "batch_size": 4}
ADDITIVE = ResidualConfig(rule="additive", value_channels=1)


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


# Sources


def test_the_digits_are_scikit_learns():
    images, theirs = load_images("digits"), load_digits()
    assert images.pixels.shape == (1797, 1, 8, 8) and images.classes == 10
    np.testing.assert_array_equal(images.pixels[:, 0] * 16, theirs.images)
    np.testing.assert_array_equal(images.labels, theirs.target)


def folder_of(path: Path, sizes: dict[str, list[tuple[int, int]]]) -> dict[str, np.ndarray]:
    """Images of random pixels, a folder per class; what was written, by name."""
    draw, written = np.random.default_rng(0), {}
    for name, shapes in sizes.items():
        (path / name).mkdir(parents=True)
        for number, (height, width) in enumerate(shapes):
            pixels = draw.integers(256, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{number}.png")
            written[f"{name}{number}"] = pixels
    return written


def test_a_folder_per_class(tmp_path):
    written = folder_of(tmp_path, {"dog": [(4, 6), (4, 6)], "cat": [(4, 6)]})
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    images = load_images(f"folder:{tmp_path}")
    assert images.pixels.shape == (3, 3, 4, 6) and images.classes == 2
    assert images.labels.tolist() == [0, 1, 1]  # in the order of the folders' names
    for found, name in zip(images.pixels, ("cat0", "dog0", "dog1"), strict=True):
        np.testing.assert_allclose(found.movedim(0, -1) * 255, written[name], atol=1e-3)


def test_sizes_of_a_folders_images(tmp_path):
    folder_of(tmp_path, {"a": [(4, 6)], "b": [(5, 6)]})
    with pytest.raises(UserError, match=r"one size, got 6 x 4 in .*a/0.png and 6 x 5 in .*b/0.png: set image_size"):
        load_images(f"folder:{tmp_path}")
    assert load_images(f"folder:{tmp_path}", size=8).pixels.shape == (2, 3, 8, 8)


def test_folders_that_hold_no_images(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="must name a folder with a folder of images per class"):
        load_images(f"folder:{tmp_path / 'absent'}")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"every class needs images \(.bmp, .*, there are none in .*a"):
        load_images(f"folder:{tmp_path}")
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken.png is no image that can be read"):
        load_images(f"folder:{tmp_path}")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"need the package pillow .*: install it with pip install pillow"):
        load_images(f"folder:{tmp_path}")


def mnist(root: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """MNIST's files with random pixels, in the format that their site describes."""
    raw, written = root / "MNIST" / "raw", {}
    raw.mkdir(parents=True)
    for part, count in counts.items():
        pixels = np.random.default_rng(count).integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
        written[part] = pixels
    return written


def test_a_data_set_of_torchvision(tmp_path):
    assert torchvision_models  # makes torchvision importable where it stands beside a CPU build of torch
    written = mnist(tmp_path, {"train": 12, "t10k": 5})
    images = load_images("torchvision:MNIST", root=str(tmp_path))
    assert images.pixels.shape == (17, 1, 28, 28) and images.classes == 10
    np.testing.assert_allclose(
        images.pixels[:, 0] * 255, np.concatenate((written["train"], written["t10k"])), atol=1e-3
    )
    assert images.labels.tolist() == [*(i % 10 for i in range(12)), *range(5)]


def test_what_torchvision_does_not_give(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'FashionMNIST'"):
        load_images("torchvision:FasionMNIST")
    with pytest.raises(
        UserError, match=f"MNIST cannot be had from root '{tmp_path}' .*fetched only with download=true"
    ):
        load_images("torchvision:MNIST", root=str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="needs the package torchvision, and beside it the build of torch"):
        load_images("torchvision:MNIST", root=str(tmp_path))


@pytest.mark.parametrize("source", ["digit", "folder:", "torchvision", "imagenet:x"])
def test_unknown_sources(source):
    with pytest.raises(UserError, match=f"digits, folder:PATH or torchvision:NAME, got '{source}'"):
        load_images(source)


def test_only_folders_are_scaled():
    with pytest.raises(UserError, match="leave image_size out for source 'digits'"):
        load_images("digits", size=16)


@pytest.mark.usefixtures("unchecked")
def test_labels_out_of_range_and_shapes():
    pixels = torch.zeros(3, 1, 4, 4)
    for labels, found in (
        (torch.tensor([0, 1, 2]), "got 2 at image 2"),
        (torch.tensor([0, -1, 1]), "got -1 at image 1"),
    ):
        with pytest.raises(UserError, match=rf"labels must lie in 0 .. 1 for 2 classes, {found}"):
            checked(pixels, labels, 2)
    with pytest.raises(UserError, match=r"with one label each, .*got shape \(3, 1, 4, 4\) and 2 labels"):
        checked(pixels, torch.tensor([0, 1]), 2)
    with pytest.raises(UserError, match=r"got shape \(3, 4, 4\)"):
        checked(pixels[:, 0], torch.tensor([0, 1, 1]), 2)


def test_the_split_is_disjoint_and_standardised_by_its_training_part():
    count = 50
    pixels = torch.arange(2 * count * 6, dtype=torch.float32).reshape(count, 2, 2, 3).square()
    images = Images(pixels, torch.arange(count), count)  # labels that say which image it is
    train, test = split_images(images, 0.3, seed=4)
    assert len(test.labels) == 15
    assert sorted([*train.labels.tolist(), *test.labels.tolist()]) == list(range(count))
    for channel in range(2):
        values = train.pixels[:, channel]
        assert abs(values.mean()) < 1e-4 and abs(values.std() - 1) < 1e-4
        shown = torch.cat((pixels[train.labels, channel], pixels[test.labels, channel])).flatten().double()
        made = torch.cat((values, test.pixels[:, channel])).flatten().double()
        assert np.corrcoef(shown, made)[0, 1] > 1 - 1e-6
    again, other = split_images(images, 0.3, seed=4)[0], split_images(images, 0.3, seed=5)[0]
    assert again.labels.equal(train.labels) and not other.labels.equal(train.labels)
    with pytest.raises(UserError, match=r"test_share must leave images on both sides, got 1.0 of 50 images"):
        split_images(images, 1.0, seed=0)


# Networks


def rms(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x / (x.square().mean(axis, keepdim=True) + ADDITIVE.norm_eps).sqrt()


def test_attention_is_torchs():
    ours, theirs = SelfAttention(12, 3), nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    theirs.in_proj_weight.data.copy_(ours.inward.weight)
    theirs.out_proj.weight.data.copy_(ours.outward.weight)
    x = randn(2, 5, 12).float()
    near(ours(x), theirs(x, x, x, need_weights=False)[0], 1e-5)


@torch.no_grad()
def test_the_plain_vit_is_pre_norm():
    vit = ViT((3, 4, 6), 5, ADDITIVE, depth=2, dim=8, heads=2, patch=2, seed=0).double()
    perturb(vit)
    images = randn(2, 3, 4, 6)
    patches = images.reshape(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 12)
    x = patches @ vit.patches.weight.reshape(8, 12).T + vit.patches.bias + vit.positions
    assert len(vit.blocks) == 4
    for block in vit.blocks:
        x = x + block.branch(rms(x, -1) * block.norm.weight)
    expected = vit.head(nn.functional.rms_norm(x, (8,), vit.norm.weight).mean(1))
    near(vit(images), expected, 1e-9)


@torch.no_grad()
def test_the_plain_resnet_adds_at_every_pixel():
    net = ResNet((1, 6, 8), 5, ADDITIVE, depth=3, dim=4, seed=0).double().eval()
    perturb(net)
    images = randn(2, 1, 6, 8)
    x = net.stem(images)
    assert [len(stage) for stage in net.stages] == [2, 1]
    for stage, after in zip(net.stages, (net.between, nn.Identity()), strict=True):
        for block in stage:
            x = x + block.branch(rms(x, 1) * block.norm.weight[:, None, None])
        x = after(x)
    assert x.shape == (2, 8, 3, 4)
    near(net(images), net.head(net.norm(x).relu().mean((-2, -1))), 1e-9)


@pytest.mark.parametrize("model", ["vit", "resnet"])
@pytest.mark.parametrize("condition", TASK.conditions)
def test_networks_of_all_conditions_give_logits_and_gradients(condition, model):
    settings = TASK.settings_of(condition, TINY)
    images = Images(randn(5, 3, 8, 6).float(), torch.arange(5), 7)
    network = build(settings, model, images, depth=3, seed=1)
    logits = network(images.pixels)
    assert logits.shape == (5, 7)
    nn.functional.cross_entropy(logits, images.labels).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_conditions_share_their_start():
    images = Images(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long), 10)
    for model in ("vit", "resnet"):
        one, other = (
            build(TASK.settings_of(name, TINY), model, images, 2, 5).state_dict() for name in ("additive", "delta-4")
        )
        assert set(one) < set(other) and all(one[name].equal(other[name]) for name in one)


@pytest.mark.usefixtures("unchecked")
def test_wrong_image_sizes():
    sizes = {"depth": 2, "dim": 8, "seed": 0}
    with pytest.raises(UserError, match="whole numbers of patches high and wide, got 8 x 7 with patch=2"):
        ViT((1, 8, 7), 3, ADDITIVE, heads=2, patch=2, **sizes)
    with pytest.raises(UserError, match="dim must be a multiple of heads, got dim=8, heads=3"):
        ViT((1, 8, 8), 3, ADDITIVE, heads=3, patch=2, **sizes)
    with pytest.raises(UserError, match="at least 4 x 4 pixels, got 3 x 9"):
        ResNet((1, 3, 9), 3, ADDITIVE, **sizes)
    with pytest.raises(UserError, match="depth must be at least 2, got 1"):
        ResNet((1, 8, 8), 3, ADDITIVE, **sizes | {"depth": 1})
    for network in (ViT((1, 8, 8), 3, ADDITIVE, heads=2, patch=2, **sizes), ResNet((1, 8, 8), 3, ADDITIVE, **sizes)):
        for shape in ((2, 1, 8, 10), (2, 3, 8, 8)):
            with pytest.raises(UserError, match=r"\(B, 1, 8, 8\), as the network was made for, got"):
                network(torch.zeros(shape))


# The task


def test_a_run_covers_the_sizes_and_depths_and_says_its_progress():
    steps: list[tuple[int, int]] = []
    found = TASK.run(TASK.settings_of("delta-4", TINY), 3, lambda done, total: steps.append((done, total)))
    assert steps == [(i, 12) for i in range(1, 13)]
    points = [f"accuracy_{model}_{point}" for model in ("vit", "resnet") for point in ("n40_d2", "n20_d2", "n40_d3")]
    assert list(found) == ["accuracy", *points]
    assert abs(found["accuracy"] - sum(found[point] for point in points) / 6) < 1e-9


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    settings = TASK.settings_of("delta", TINY)
    before = torch.random.get_rng_state()
    first, again, other = (TASK.run(settings, seed, quiet) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_small_networks_learn_the_digits(model):
    """A guess is right in a tenth of the images."""
    small = {"models": [model], "train_images": [400], "depths": [2], "dim": 16, "steps": 80, "lr": 0.01}
    assert TASK.run(TASK.settings_of("delta", small), 100, quiet)["accuracy"] > 0.4


def test_a_run_on_a_folder(tmp_path):
    folder_of(tmp_path, {"a": [(8, 8)] * 4, "b": [(8, 8)] * 4})
    changes = TINY | {"source": f"folder:{tmp_path}", "train_images": [4], "depths": [2], "steps": 1}
    found = TASK.run(TASK.settings_of("additive", changes), 0, quiet)
    assert 0 <= found["accuracy"] <= 1 and len(found) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["vit", "resnet50"]}, "there is no model 'resnet50'; did you mean 'resnet'"),
        ({"depths": []}, "depths must be different values, at least one"),
        ({"train_images": [50, 50]}, "train_images must be different values"),
        ({"train_images": [1]}, "train_images must be at least 2"),
        ({"train_images": [1797]}, "at most the 1078 images that are not for testing, got 1797"),
        ({"test_share": float("nan")}, "test_share must be finite, got nan"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"patch": 3}, "whole numbers of patches"),
        ({"dephts": [2]}, "did you mean 'depths'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TASK.run(TASK.settings_of("delta", TINY | changes), 0, quiet)


def test_the_defaults_train_every_model_at_every_size_and_depth():
    points = DigitsSettings().points()
    assert points[:4] == [("vit", 200, 2), ("vit", 50, 2), ("vit", 800, 2), ("vit", 200, 8)]
    assert [("resnet", *rest) for _, *rest in points[:4]] == points[4:]

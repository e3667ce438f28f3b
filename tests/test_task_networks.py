"""Ordinary networks around a stream: what they compute, that conditions share their start, and that they learn."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from deepdelta import UserError
from deepdelta.lab.tasks import load_task
from deepdelta.lab.tasks.networks import NETWORKS, Network
from helpers import randn

pytestmark = pytest.mark.usefixtures("unchecked_file")

TASK = load_task("networks")
SMALL: dict[str, Any] = {"steps": 40, "depth": 2, "dim": 32, "rates": [3e-3]}


def network(kind: str, condition: str = "additive") -> Network:
    torch.manual_seed(0)
    return Network(kind, TASK.settings_of(condition, {"depth": 2, "dim": 16}), 10, 8, seed=0)


def nothing(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_plain_networks_add_what_a_branch_makes_of_a_norm(kind: str) -> None:
    net, images = network(kind).double(), randn(3, 1, 8, 8)
    x = net.inward(images)
    if kind == "encoder":
        x = x.flatten(2).mT + net.positions
    for block in net.blocks:
        axis = 1 if kind == "cnn" else -1
        branch = block.branch
        assert isinstance(branch, nn.Module)
        x = x + branch(x / (x.square().mean(axis, keepdim=True) + 1e-5).sqrt())
    pooled = {"mlp": x, "cnn": x.flatten(2).mean(-1) if kind == "cnn" else x, "encoder": x.mean(1)}[kind]
    torch.testing.assert_close(net(images), net.outward(pooled), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_default_starts_as_the_plain_network_and_a_normed_one_adds_a_quarter(kind: str) -> None:
    images = randn(3, 1, 8, 8).float()
    plain = network(kind)(images)
    for condition in ("default-1", "default-4", "default-4-write-only"):
        torch.testing.assert_close(network(kind, condition)(images), plain, rtol=1e-5, atol=1e-5)
    normed = network(kind, "normed")
    for block in normed.blocks:
        c, _ = block.open(normed.stream.expand(normed.inward(images) if kind != "encoder" else randn(3, 16, 8).float()))  # type: ignore[operator]
        h = block.branch(c)  # type: ignore[operator]
        size = h.square().mean(1 if kind == "cnn" else -1).sqrt()
        torch.testing.assert_close(size, torch.full_like(size, 0.25), rtol=0.05, atol=0)


def test_a_run_gives_the_mean_of_the_logarithms_and_the_same_again() -> None:
    settings = TASK.settings_of("default-4", SMALL | {"steps": 3})
    seen: list[tuple[int, int]] = []
    found = TASK.run(settings, 1, lambda done, total: seen.append((done, total)))
    losses = [found[f"loss_{kind}_lr0.003"] for kind in NETWORKS]
    assert found["log_loss"] == pytest.approx(sum(map(math.log, losses)) / 3, rel=1e-12)
    assert seen[-1] == (9, 9)
    assert found == TASK.run(settings, 1, nothing) != TASK.run(settings, 2, nothing)


@pytest.mark.parametrize("condition", ["additive", "normed", "default-4", "delta-4"])
def test_it_learns(condition: str) -> None:
    settings = TASK.settings_of(condition, SMALL | {"steps": 150, "networks": ["mlp"]})
    assert TASK.run(settings, 0, nothing)["accuracy_mlp_lr0.003"] > 0.8


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(UserError, match="there is no network 'mpl'; did you mean 'mlp'"):
        dataclasses.replace(TASK.settings, networks=("mpl",))

"""Attention and MLP split over ranks: every gradient is that of the whole model, and what every rank has whole gets the
same bits on each."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from deepdelta import GPT, PRESETS, GPTConfig, use_backend
from deepdelta.training.parallel import clip_gradients, whole
from deepdelta.training.ranks import together
from deepdelta.training.tensor_parallel import split
from rank_runs import by_ranks

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "write-only": {"preset": "paper-cc", "rule": "write_only"},
    "token": {"preset": "paper-tc"},
    "one-channel": {"preset": "paper-cc", "expansion": "repeat", "value_channels": 1},
}


def differences(folder: Path, names: list[str]) -> dict[str, list[float]]:
    """Of each model and backend: of the loss, of the gradients and of their norm, relative; and the number of
    parameters that are whole on every rank whose gradients differ between ranks."""
    found = {}
    with together(60.0) as ranks:
        mesh = init_device_mesh("cpu", (ranks.size,))
        for name in names:
            changes = dict(SETTINGS[name])
            residual = copy.copy(PRESETS[changes.pop("preset", "ddl")])
            residual = type(residual)(**{**vars(residual), **changes})
            config = GPTConfig(vocab_size=12, dim=8, heads=4, mlp_dim=20, layers=2, context=8, residual=residual)
            for backend in ("reference", "fused"):
                one = GPT(config, seed=4).double()
                with torch.no_grad():
                    for parameter in one.parameters():
                        parameter.add_(0.1)  # what is 0 at the start keeps gradients at 0 behind it
                use_backend(one, backend)
                ours = copy.deepcopy(one)
                split(ours, mesh)
                ids = torch.randint(12, (4, 9), generator=torch.Generator().manual_seed(5))
                losses = [model(ids[:, :-1], ids[:, 1:]).loss for model in (ours, one)]
                for loss in losses:
                    loss.backward()
                worst, unequal = 0.0, 0
                for (key, a), b in zip(ours.named_parameters(), one.parameters(), strict=True):
                    assert a.grad is not None and b.grad is not None, key
                    gradient = whole(a.grad)
                    assert b.grad.abs().sum() > 0, key
                    worst = max(worst, ((gradient - b.grad).abs().max() / b.grad.abs().max()).item())
                    every = [torch.empty_like(b.grad) for _ in range(ranks.size)]
                    dist.all_gather(every, gradient.contiguous())
                    unequal += any(not other.equal(every[0]) for other in every)
                norms = [clip_gradients(model, 0.5) for model in (ours, one)]
                clipped = [whole(model.layers[0].mlp.wrapped().up.weight.grad) for model in (ours, one)]
                torch.testing.assert_close(*clipped, rtol=1e-9, atol=1e-12)
                found[f"{name}-{backend}"] = [
                    abs((losses[0] - losses[1]).item()),
                    worst,
                    abs((norms[0] / norms[1] - 1).item()),
                    unequal,
                ]
    return found


def check(folder: Path, size: int, names: list[str]) -> None:
    for found in by_ranks(size, folder, differences, names):
        assert len(found) == 2 * len(names)
        for name, (loss, gradient, norm, unequal) in found.items():
            assert loss < 1e-12 and gradient < 1e-9 and norm < 1e-12 and unequal == 0, (name, found[name])


def test_two_have_the_gradients_of_one(tmp_path: Path) -> None:
    check(tmp_path, 2, ["default", "token"])


@pytest.mark.scale
def test_four_have_the_gradients_of_one(tmp_path: Path) -> None:
    check(tmp_path, 4, [*SETTINGS])

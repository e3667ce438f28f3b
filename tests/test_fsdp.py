"""fully_shard (FSDP2) layer by layer trains what the whole model trains, on the CPU with gloo."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from deepdelta import GPT, PRESETS, DeltaStream, GPTConfig, UserError, param_groups, use_backend
from deepdelta.decoding import DecodingCache

# torch's own, about a view that a custom operator's output is.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")


def model_of(preset: str, backend: str = "reference") -> GPT:
    config = GPTConfig(vocab_size=12, dim=12, heads=2, layers=2, context=8, residual=PRESETS[preset])
    model = GPT(config, seed=4)
    use_backend(model, backend)
    return model


def sharded(model: GPT) -> GPT:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: nn.Module, first: int, last: int) -> list[float]:
    """The losses of three steps on rows first .. last - 1 of every batch of four."""
    optimizer, losses = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(12, (4, 9), generator=generator)
        loss = model(ids[first:last, :-1], ids[first:last, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


FEW = ("additive", "ddl", "paper-tc", "code-cc")


@pytest.mark.parametrize(
    "preset", [name if name in FEW else pytest.param(name, marks=pytest.mark.scale) for name in PRESETS]
)
def test_every_preset(preset: str, alone: None, unchecked: None) -> None:
    for backend in ("reference", "fused"):
        whole = model_of(preset, backend)
        model = sharded(copy.deepcopy(whole))
        assert trained(model, 0, 4) == pytest.approx(trained(whole, 0, 4), rel=1e-4)


def test_it_says_so(alone: None) -> None:
    model = model_of("paper-cc")
    assert "each residual opens the next" in repr(model)
    sharded(model)
    assert "sharded or with hooks, and so opening their own state: layers.0 (FSDPLayer)" in repr(model)
    with pytest.raises(UserError, match="cached decoding needs whole parameters, and these are sharded"):
        DecodingCache(model)


def test_a_sharded_residual_in_a_chain(alone: None, unchecked: None) -> None:
    stream = DeltaStream(6, 4, seed=1)
    chain = stream.chain([stream.wrap(nn.Linear(6, 6)) for _ in range(3)]).double()
    state = stream.double().expand(torch.ones(2, 5, 6, dtype=torch.float64).cumsum(1)).detach()
    for backend in ("reference", "fused"):
        use_backend(chain, backend)
        expected = chain(state)
        part = copy.deepcopy(chain)
        fully_shard(part[1], mesh=init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(part(state), expected, rtol=1e-10, atol=1e-10)


def gradients(model: nn.Module, first: int, last: int) -> dict[str, Tensor]:
    """Of the loss of rows first .. last - 1, whole, by the names of the parameters."""
    ids = torch.randint(12, (4, 9), generator=torch.Generator().manual_seed(5))
    model(ids[first:last, :-1], ids[first:last, 1:]).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def assert_gradients(preset: str, first: int, last: int) -> None:
    """Those of one (1,) parameter too: PyTorch has had a report of such a one whose gradient was 0 when sharded."""
    whole = model_of(preset)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1)  # what is 0 at the start keeps gradients at 0 behind it
    part = sharded(copy.deepcopy(whole))
    expected = gradients(whole, 0, 4)
    for name, gradient in gradients(part, first, last).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=f"{preset}: {name}")
        assert expected[name].abs().sum() > 0, f"{preset}: {name}"
    tiny = [name for name, gradient in expected.items() if gradient.shape == (1,)]
    assert tiny or preset.startswith("additive"), "gates have biases of one number"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_gradient(preset: str, alone: None, unchecked: None) -> None:
    assert_gradients(preset, 0, 4)


def _rank(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    for preset in PRESETS:
        assert_gradients(preset, 2 * rank, 2 * rank + 2)
        results[f"{preset} {rank}"] = trained(sharded(model_of(preset)), 2 * rank, 2 * rank + 2)
    dist.destroy_process_group()


@pytest.mark.scale  # what tests/test_ranks.py does with three of them
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Each rank sees half of every batch: the mean of their losses is that of one process on the whole batch, and every
    gradient its own."""
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_rank, (str(tmp_path / "store"), results), nprocs=2)
        for preset in PRESETS:
            means = [(a + b) / 2 for a, b in zip(results[f"{preset} 0"], results[f"{preset} 1"], strict=True)]
            assert means == pytest.approx(trained(model_of(preset), 0, 4), rel=1e-4), preset

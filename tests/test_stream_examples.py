"""A delta stream around networks of three kinds, each converted as the documentation shows it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import deepdelta
from deepdelta import PRESETS, DeltaStream, UserError
from deepdelta.nn import resnet_branch
from helpers import randn
from torchvision_beside_cpu_torch import models

# A plain multi-layer perceptron: expand once, wrap each hidden layer, reduce once.


class DeltaMLP(nn.Module):
    def __init__(self, inputs: int, width: int, classes: int, depth: int, **options: object) -> None:
        super().__init__()
        self.inward = nn.Linear(inputs, width)
        self.stream = DeltaStream(width, **options)
        self.blocks = nn.Sequential(
            *(
                self.stream.wrap(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)))
                for _ in range(depth)
            )
        )
        self.outward = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        state = self.blocks(self.stream.expand(self.inward(x)))
        return self.outward(self.stream.reduce(state))


# A torchvision ResNet: images are (N, C, H, W) and states (N, V, C, H, W). Blocks that keep their shape become deltas
# around their convolutions, with the network's ReLU on every value channel; a block that changes width or resolution
# runs as it is, on the reduced state.


class DeltaStage(nn.Module):
    """One stage of a ResNet; the blocks it takes over stay the network's own."""

    def __init__(self, stage: nn.Sequential, width: int, **options: object) -> None:
        super().__init__()
        blocks = list(stage)
        self.first = blocks.pop(0) if blocks[0].downsample is not None else nn.Identity()
        self.stream = DeltaStream(width, channel_first=True, norm="none", **options)
        self.residuals = nn.ModuleList(self.stream.wrap(resnet_branch(block)) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        state = self.stream.expand(self.first(x))
        for residual in self.residuals:
            state = torch.relu(residual(state))
        return self.stream.reduce(state)


def delta_resnet(network: models.ResNet, **options: object) -> models.ResNet:
    """The network with delta residuals; its weights are used, not copied."""
    for i in range(1, 5):
        stage = getattr(network, f"layer{i}")
        last = stage[-1]
        width = (last.bn3 if hasattr(last, "bn3") else last.bn2).num_features
        setattr(network, f"layer{i}", DeltaStage(stage, width, **options))
    return network


# A transformer encoder block: attention returns a tuple and takes masks, both pass through.


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x, **masks)


class DeltaEncoderBlock(nn.Module):
    def __init__(self, stream: DeltaStream, heads: int) -> None:
        super().__init__()
        width = stream.dim
        self.attention = stream.wrap(SelfAttention(width, heads))
        self.feed_forward = stream.wrap(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        )

    def forward(self, state: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
        state, weights = self.attention(state, **masks)
        return self.feed_forward(state), weights


# Multi-layer perceptron


def rings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points in five dimensions; the class is the ring of the first two."""
    x = randn(count, 5, seed=seed).float()
    return x, (x[:, :2].norm(dim=-1) > 1.177).long()  # the median


@pytest.mark.parametrize("options", [{}, {"rule": "additive", "value_channels": 1}, {"rule": "two_gate"}], ids=str)
def test_the_perceptron_learns(options):
    torch.manual_seed(0)
    network = DeltaMLP(5, 16, 2, depth=3, seed=0, **options)
    optimizer = torch.optim.AdamW(deepdelta.param_groups(network, weight_decay=0.01), lr=1e-2)
    x, y = rings(512, seed=1)
    for _ in range(60):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test_x, test_y = rings(512, seed=2)
    assert (network(test_x).argmax(-1) == test_y).float().mean() > 0.85
    assert (test_y == 1).float().mean() < 0.6


def test_the_additive_perceptron_is_the_plain_residual_network():
    network = DeltaMLP(5, 8, 2, depth=2, rule="additive", value_channels=1, norm="none")
    x = randn(7, 5).float()
    plain = network.inward(x)
    for residual in network.blocks:
        plain = plain + residual.branch(plain)
    assert network(x).equal(network.outward(plain))
    assert not list(network.stream.parameters())


# ResNet


def settled(network: models.ResNet) -> models.ResNet:
    """With running statistics and affine weights away from 0 and 1, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


@pytest.mark.parametrize("build", [models.resnet18, models.resnet50])
def test_the_additive_resnet_is_the_network_it_was_made_of(build):
    """Exactly: nothing is added twice, left out or applied in another order."""
    torch.manual_seed(0)
    original = settled(build(num_classes=7))
    converted = delta_resnet(copy.deepcopy(original), rule="additive", value_channels=1)
    images = randn(2, 3, 40, 40).float()
    with torch.no_grad():
        assert converted(images).equal(original(images))
    count = sum(parameter.numel() for parameter in original.parameters())
    assert sum(parameter.numel() for parameter in converted.parameters()) == count
    wrapped = sum(isinstance(module, deepdelta.DeltaResidual) for module in converted.modules())
    assert wrapped == {models.resnet18: 5, models.resnet50: 12}[build]


def test_expanded_additive_with_equal_channels_is_the_network_too():
    """V = 4 with w_h = 1: every value channel carries the plain network."""
    original = settled(models.resnet18(num_classes=7))
    converted = delta_resnet(copy.deepcopy(original), rule="additive", value_channels=4)
    for module in converted.modules():
        if isinstance(module, deepdelta.DeltaResidual):
            nn.init.zeros_(module.write.map.weight)
    images = randn(2, 3, 32, 32).float()
    with torch.no_grad():
        torch.testing.assert_close(converted(images), original(images), rtol=1e-4, atol=1e-4)


def test_the_delta_resnet_trains():
    torch.manual_seed(0)
    network = delta_resnet(models.resnet18(num_classes=3), value_channels=4, seed=0)
    own = [name for name, _ in network.named_parameters() if ".erase_gate." in name or ".write." in name]
    assert len(own) == 5 * 4
    optimizer = torch.optim.AdamW(deepdelta.param_groups(network, weight_decay=0.01), lr=1e-3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    images = randn(6, 3, 24, 24).float() + labels[:, None, None, None]
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(network(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_a_shortcut_map_on_every_value_channel():
    """The other way through a change of stage: the block's own shortcut, channel by channel."""
    block = settled(models.resnet18()).layer2[0]
    before = DeltaStream(64, value_channels=3, channel_first=True, norm="none", seed=0)
    state = randn(2, 3, 64, 8, 8).float()
    mapped = before.map_channels(block.downsample, state)
    assert mapped.shape == (2, 3, 128, 4, 4)
    for j in range(3):
        torch.testing.assert_close(mapped[:, j], block.downsample(state[:, j]))
    after = DeltaStream(128, value_channels=3, channel_first=True, norm="none")
    assert after.reduce(mapped).shape == (2, 128, 4, 4)


def test_channel_last_maps():
    stream = DeltaStream(6, value_channels=3)
    widen = nn.Linear(6, 5)
    for shape in ((), (2,), (2, 4)):
        state = randn(*shape, 3, 6).float()
        mapped = stream.map_channels(widen, state)
        assert mapped.shape == (*shape, 3, 5)
        torch.testing.assert_close(mapped, widen(state))


@pytest.mark.parametrize(("value_channels", "compression"), [(1, "channel"), (3, "channel"), (3, "channel_conv")])
def test_images_are_positions_of_a_channel_last_stream(value_channels, compression):
    """(N, V, C, H, W) and (N, H, W, V, C): the same numbers, permuted, and the same gradients."""
    options = vars(PRESETS["plain-start"]) | {"value_channels": value_channels, "seed": 4}
    options |= {"compression": compression, "compression_kernel": 2}
    x = randn(2, 6, 3, 5).float().requires_grad_()
    results = []
    for first in (True, False):
        stream = DeltaStream(6, channel_first=first, **options)
        residual = stream.wrap(PixelMap(first))
        given = x if first else x.permute(0, 2, 3, 1)
        out = stream.reduce(residual(residual(stream.expand(given))))
        results.append(out if first else out.permute(0, 3, 1, 2))
    torch.testing.assert_close(*results)
    cotangent = randn(2, 6, 3, 5, seed=9).float()
    torch.testing.assert_close(*(torch.autograd.grad(result, x, cotangent)[0] for result in results))


class PixelMap(nn.Module):
    """The same linear map of the features at every position, in either layout."""

    def __init__(self, channel_first: bool) -> None:
        super().__init__()
        self.channel_first, self.weight = channel_first, randn(6, 6, seed=5).float()

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,dc->ndhw" if self.channel_first else "nhwc,dc->nhwd", x, self.weight)


# Transformer encoder block


def encoder(**options: object) -> tuple[DeltaStream, nn.ModuleList]:
    torch.manual_seed(0)
    stream = DeltaStream(16, seed=0, **options)
    return stream, nn.ModuleList(DeltaEncoderBlock(stream, heads=2) for _ in range(2))


def test_masks_go_in_and_weights_come_out():
    stream, blocks = encoder(value_channels=4)
    x = randn(2, 5, 16).float()
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        state = stream.expand(x)
        for block in blocks:
            state, weights = block(state, attn_mask=causal, key_padding_mask=padding)
        return stream.reduce(state), weights

    y, weights = run(x)
    assert y.shape == x.shape and weights.shape == (2, 5, 5)
    assert weights.masked_select(causal).eq(0).all() and weights[1, :, 3:].eq(0).all()
    later = x.clone()
    later[:, 3] += 1.0
    after = run(later)[0]
    assert after[:, :3].equal(y[:, :3]) and not torch.isclose(after[0, 3:], y[0, 3:]).all(-1).any()


def test_the_additive_block_is_torch_s_pre_norm_layer():
    """With RMSNorm in place of LayerNorm and the weights of an nn.TransformerEncoderLayer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    layer.norm1, layer.norm2 = nn.RMSNorm(16, eps=1e-5), nn.RMSNorm(16, eps=1e-5)
    stream, blocks = encoder(rule="additive", value_channels=1)
    block = blocks[0]
    block.attention.branch.attention.load_state_dict(layer.self_attn.state_dict())
    block.feed_forward.branch[0].load_state_dict(layer.linear1.state_dict())
    block.feed_forward.branch[2].load_state_dict(layer.linear2.state_dict())
    x = randn(3, 5, 16).float()
    torch.testing.assert_close(stream.reduce(block(stream.expand(x))[0]), layer(x), rtol=1e-5, atol=1e-6)


# What holds for all three


def examples() -> dict[str, nn.Module]:
    stream, blocks = encoder(value_channels=2)
    return {
        "perceptron": DeltaMLP(5, 8, 2, depth=2),
        "resnet": delta_resnet(models.resnet18(), value_channels=2),
        "encoder": nn.ModuleDict({"stream": stream, "blocks": blocks}),
    }


@pytest.mark.parametrize("name", ["perceptron", "resnet", "encoder"])
def test_every_tensor_appears_once_in_the_state(name):
    network = examples()[name]
    state = network.state_dict()
    storages = [tensor.untyped_storage().data_ptr() for tensor in state.values()]
    assert len(set(storages)) == len(storages)
    assert set(state) == {key for key, _ in [*network.named_parameters(), *network.named_buffers()]}


def test_a_copy_shares_nothing_and_computes_the_same():
    network = examples()["perceptron"]
    copied, x = copy.deepcopy(network), randn(4, 5).float()
    expected = network(x)
    assert copied(x).equal(expected)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert copied(x).equal(expected) and not network(x).equal(expected)


@pytest.mark.parametrize(
    ("branch", "advice"),
    [
        (lambda: models.resnet18().layer1[0], "BasicBlock .*wrap deepdelta.nn.resnet_branch"),
        (lambda: models.resnet50().layer1[1], "Bottleneck .*wrap deepdelta.nn.resnet_branch"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "TransformerEncoderLayer .*self-attention and its feed-forward"),
        (lambda: nn.TransformerDecoderLayer(8, 2), "TransformerDecoderLayer .*attentions and its feed-forward"),
        (lambda: DeltaStream(8).wrap(nn.Identity()), "DeltaResidual .*wrapped already"),
        (lambda: Subclass(8, 2), "TransformerEncoderLayer adds its input itself"),
        (lambda: checkpoint_wrapper(nn.TransformerEncoderLayer(8, 2)), "TransformerEncoderLayer adds its input"),
    ],
)
def test_what_adds_its_input_is_refused(branch, advice):
    with pytest.raises(UserError, match=advice):
        DeltaStream(8).wrap(branch())


class Subclass(nn.TransformerEncoderLayer):
    pass


def test_a_block_that_changes_width_is_no_branch():
    with pytest.raises(UserError, match=r"BasicBlock changes width or resolution.*stream.reduce"):
        resnet_branch(models.resnet18().layer2[0])
    with pytest.raises(UserError, match="takes a torchvision BasicBlock or Bottleneck, got Linear"):
        resnet_branch(nn.Linear(2, 2))
    stream = DeltaStream(64, channel_first=True, norm="none")
    residual = stream.wrap(models.resnet18().layer2[0].conv1)
    with pytest.raises(UserError, match="where the width changes, reduce the state and expand it again"):
        residual(stream.expand(randn(1, 64, 4, 4).float()))


def test_the_branch_is_made_of_the_block_s_own_modules():
    block = models.resnet50().layer1[1]
    branch = resnet_branch(block)
    assert [type(part).__name__ for part in branch] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["Conv2d", "BatchNorm2d"]
    assert {id(p) for p in branch.parameters()} == {id(p) for p in block.parameters()}


@pytest.mark.parametrize(
    "branch",
    [
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(64, 2, batch_first=True), 1, enable_nested_tensor=False
        ),
        lambda: models.resnet18().layer1,
    ],
    ids=["encoder", "stage"],
)
def test_stacks_of_blocks_that_add_their_input_are_refused(branch):
    with pytest.raises(UserError, match="adds its input itself"):
        DeltaStream(64, channel_first=True).wrap(branch())


def test_a_block_of_another_library_with_the_same_name_is_not_taken_apart():
    class BasicBlock(nn.Module):
        """Pre-activation: the same parts in another order."""

    with pytest.raises(UserError, match="takes a torchvision BasicBlock or Bottleneck, got BasicBlock"):
        resnet_branch(BasicBlock())

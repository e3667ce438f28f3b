"""Which parameters are decayed: matrices and embeddings; never gates, biases, norms, reads."""

import pytest
import torch
from torch import nn

from deepdelta import GPT, PRESETS, DeltaStream, GPTConfig, UserError, param_groups
from helpers import randn

BRANCH = [
    *(f"attention.branch.{part}.weight" for part in ("query", "key", "value", "out")),
    *(f"mlp.branch.{part}.weight" for part in ("gate", "up", "out")),
]
RESIDUAL: dict[str, list[str]] = {
    "additive": [],
    "paper-cc": ["target.map.weight"],
    "paper-v1": ["target.map.weight", "direction.inner.weight", "direction.outer.weight"],
    "paper-tc": ["target.map.weight"],
}


def names(module: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    return sorted(by_id[id(parameter)] for parameter in parameters)


@pytest.mark.parametrize("preset", RESIDUAL)
def test_membership_in_a_gpt(preset):
    model = GPT(GPTConfig(vocab_size=9, dim=8, heads=2, layers=2, context=4, residual=PRESETS[preset]))
    matrices, embeddings, exempt = param_groups(model, 0.1)
    assert [group["weight_decay"] for group in (matrices, embeddings, exempt)] == [0.1, 0.1, 0.0]
    expected = list[str]()
    for i in range(2):
        expected += [f"layers.{i}.{name}" for name in BRANCH]
        expected += [f"layers.{i}.{residual}.{name}" for residual in ("attention", "mlp") for name in RESIDUAL[preset]]
    everything = sorted(name for name, _ in model.named_parameters())
    assert names(model, matrices["params"]) == sorted(expected)
    assert names(model, embeddings["params"]) == ["embedding.weight"]
    assert names(model, exempt["params"]) == sorted(set(everything) - {"embedding.weight", *expected})


class Everything(nn.Module):
    """Layers of torch around a stream with every kind of exempt part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.stream = DeltaStream(8, 3, compression="token", expansion="embedding_conv", rule="two_gate", seed=0)
        self.mix = self.stream.wrap(nn.Linear(8, 8))
        self.deep = DeltaStream(
            8, 3, gate="two_layer", compression="channel_conv", compression_kernel=2, rule="delta"
        ).wrap()
        self.plain = nn.LayerNorm(8)
        self.image_norm = nn.LayerNorm((4, 8))
        self.batch_norm = nn.BatchNorm2d(3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.LSTM(8, 8)
        self.convolution = nn.Conv2d(3, 3, 2)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))


def test_membership_in_any_module():
    module = Everything()
    matrices, embeddings, exempt = param_groups(module, 0.01)
    assert names(module, embeddings["params"]) == ["convolution.weight", "embed.weight"]
    assert names(module, matrices["params"]) == sorted(
        [
            "mix.branch.weight",
            "mix.write.map.weight",
            "deep.target.map.weight",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "recurrent.weight_ih_l0",
            "recurrent.weight_hh_l0",
        ]
    )
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    decayed = names(module, [*matrices["params"], *embeddings["params"]])
    assert names(module, exempt["params"]) == sorted(trained - set(decayed))
    kept = names(module, exempt["params"])
    for name in (
        "mix.gate.outer.weight",
        "mix.erase_gate.outer.weight",
        "deep.gate.inner.weight",
        "deep.gate.outer.weight",
        "mix.norm.weight",
        "mix.compression.weight",
        "mix.compression.read",
        "stream.readout.weight",
        "stream.expansion.weight",
        "image_norm.weight",
        "scale",
    ):
        assert name in kept


def test_shared_parameters_appear_once():
    module = Everything()
    groups = param_groups(module, 0.01)
    identities = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(set(identities)) == len(identities)
    assert identities.count(id(module.embed.weight)) == 1
    torch.optim.AdamW(groups)  # refuses duplicates itself


def test_a_step_without_gradient_signal_moves_only_the_decayed():
    """The point of the groups: decay alone must not pull a gate, a norm or a read anywhere."""
    model = GPT(GPTConfig(vocab_size=9, dim=8, heads=2, layers=1, context=4, residual=PRESETS["paper-cc"]))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(param_groups(model, 0.5), lr=0.1).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    matrices, embeddings, _ = param_groups(model, 0.5)
    assert moved == set(names(model, [*matrices["params"], *embeddings["params"]]))


def test_a_module_without_matrices():
    module = nn.LayerNorm(4)
    groups = param_groups(module, 0.1)
    assert [len(group["params"]) for group in groups] == [0, 0, 2]
    module(randn(2, 4).float()).sum().backward()
    torch.optim.AdamW(groups).step()


def test_negative_decay_is_refused():
    with pytest.raises(UserError, match=r"weight_decay must be at least 0, got -0\.1"):
        param_groups(nn.Linear(2, 2), -0.1)

"""Which parameters a residual has, how they start, and that what two rules share starts bit-equal."""

import copy
import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepdelta import DeltaStream, ResidualConfig
from deepdelta.nn import initialise
from deepdelta.nn.config import LEAST_GATE
from helpers import near, randn

RULES = ["delta", "write_only", "erase_only", "additive", "additive_erase", "two_gate"]
D, V = 12, 3
GATE = {"gate.outer.weight": (1, D), "gate.outer.bias": (1,)}
ERASE = {"erase_gate.outer.weight": (1, D), "erase_gate.outer.bias": (1,)}
BY_RULE: dict[str, dict[str, tuple[int, ...]]] = {
    "delta": {**GATE, "target.map.weight": (V, D)},
    "write_only": {**GATE, "target.map.weight": (V, D)},
    "erase_only": GATE,
    "additive": {"write.map.weight": (V, D)},
    "additive_erase": {**ERASE, "write.map.weight": (V, D)},
    "two_gate": {**GATE, **ERASE, "write.map.weight": (V, D)},
    "channels": {**GATE, "gate.opening": (1,), "channels.map.weight": (V + 1, D)},
}
COMMON = {"norm.weight": (D,), "compression.weight": (V, D)}


def parameters(channels: int = V, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    config = ResidualConfig(value_channels=channels, **options)
    return dict(DeltaStream(D, seed=seed, **vars(config)).wrap().named_parameters())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("rule", BY_RULE)
def test_a_rule_creates_only_what_it_uses(rule):
    assert shapes(parameters(rule=rule)) == {**COMMON, **BY_RULE[rule]}


@pytest.mark.parametrize("rule", RULES)
def test_at_one_value_channel_nothing_is_compressed(rule):
    expected = {name: (1, D) if name.endswith("map.weight") else shape for name, shape in BY_RULE[rule].items()}
    if rule in ("additive", "additive_erase"):
        del expected["write.map.weight"]  # w_h = 1: the plain residual
    assert shapes(parameters(1, rule=rule)) == {"norm.weight": (D,), **expected}


PARTS: list[tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ({"rank": 2}, {"direction.maps.weight": (2 * D, D), "gate.outer.weight": (2, D), "target.map.weight": (2 * V, D)}),
    ({"gate_per_channel": True}, {"gate.outer.weight": (V, D), "gate.outer.bias": (V,)}),
    (
        {"gate": "two_layer", "gate_hidden": 7},
        {"gate.inner.weight": (7, D), "gate.inner.bias": (7,), "gate.outer.weight": (1, 7)},
    ),
    ({"gate": "two_layer"}, {"gate.inner.weight": (128, D)}),
    ({"gate": "two_layer", "gate_hidden_bias": False}, {"gate.inner.bias": ()}),
    ({"gate": "constant"}, {"gate.outer.weight": (), "gate.outer.bias": ()}),
    ({"target": "constant"}, {"target.map.weight": ()}),
    ({"target": "scaled_sigmoid"}, {"target.map.bias": (V,)}),
    ({"target": "linear_input"}, {"target.map.bias": (V,)}),
    ({"target": "affine"}, {"target.level": (V,)}),
    ({"target": "magnitude"}, {}),
    ({"compression": "token"}, {"compression.weight": (V, D, 4), "compression.read": (V,)}),
    (
        {"compression": "channel_conv", "compression_kernel": 2},
        {"compression.weight": (D, 2), "compression.read": (V,)},
    ),
    ({"norm": "none"}, {"norm.weight": ()}),
    (
        {"direction": "pooled", "target": "branch", "direction_pool": "attention", "direction_hidden": 5},
        {
            "direction.inner.weight": (5, D),
            "direction.inner.bias": (5,),
            "direction.outer.weight": (D, 5),
            "direction.outer.bias": (D,),
            "direction.query": (D,),
        },
    ),
]


@pytest.mark.parametrize(("options", "changes"), PARTS, ids=lambda part: "-".join(map(str, part)))
def test_a_part_creates_only_what_it_uses(options, changes):
    """The shapes of the default residual with these changed; () stands for a parameter that is not there."""
    expected = {**COMMON, **BY_RULE["delta"], **changes}
    if options.get("rank") == 2:
        expected["gate.outer.bias"] = (2,)
    if options.get("gate") == "two_layer":
        expected["gate.outer.weight"] = (1, options.get("gate_hidden", 128))
        expected.setdefault("gate.inner.weight", (128, D))
        expected.setdefault("gate.inner.bias", (128,))
    assert shapes(parameters(**options)) == {name: shape for name, shape in expected.items() if shape}


@pytest.mark.parametrize("channels", [1, V])
@pytest.mark.parametrize("pair", [*combinations(RULES, 2)], ids="-".join)
def test_what_two_rules_share_starts_bit_equal(pair, channels):
    one, two = (parameters(channels, seed=3, rule=rule) for rule in pair)
    shared = one.keys() & two.keys()
    assert "norm.weight" in shared
    assert [name for name in sorted(shared) if not torch.equal(one[name], two[name])] == []


def test_a_start_depends_on_the_seed_and_the_place():
    stream = DeltaStream(D, V, seed=1, rule="delta")
    first, second = (dict(stream.wrap().named_parameters()) for _ in range(2))
    again = parameters(seed=1)
    other = parameters(seed=2)
    for name in ("gate.outer.weight", "target.map.weight"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])


def test_without_a_seed_it_comes_from_torch_s_generator():
    draws = []
    for manual in (5, 5, 6):
        torch.manual_seed(manual)
        draws.append(dict(DeltaStream(D, V, rule="delta").wrap().named_parameters())["target.map.weight"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_seed_leaves_torch_s_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    DeltaStream(D, V, seed=1, compression="token", compression_init="random", rule="delta").wrap()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_a_plain_start_is_the_plain_residual_and_its_value_channels_are_not_alike(channels):
    stream = DeltaStream(D, channels, rule="additive_erase", plain_start=True, seed=0)
    residual, x, h = stream.wrap(), randn(7, D).float(), randn(7, D, seed=1).float()
    state = residual.open(stream.expand(x))[1](h)
    assert state.equal((x + h).unsqueeze(-2).expand(state.shape))
    torch.testing.assert_close(stream.reduce(state), x + h, rtol=1e-6, atol=1e-6)
    if channels > 1:
        weight = residual.compression.weight * channels
        assert set(weight.unique().tolist()) == ({0.5, 1.5} if channels % 2 == 0 else {0.5, 1.0, 1.5})
        assert len(weight.unique(dim=0)) == channels


def test_the_branch_is_never_drawn_anew():
    branch = nn.Linear(D, D)
    before = copy.deepcopy(branch.state_dict())
    residual = DeltaStream(D, V, seed=0, rule="delta").wrap(branch)
    assert residual.branch is branch
    assert all(torch.equal(before[name], tensor) for name, tensor in branch.state_dict().items())


@pytest.mark.parametrize("init_factor", [0.5, 2.0])
def test_matrices_start_normal_with_the_stated_deviation(init_factor):
    dim = 512
    stream = DeltaStream(
        dim, 4, seed=0, init_factor=init_factor, compression="token", compression_init="random", rank=2, rule="delta"
    )
    residual = stream.wrap()
    std = init_factor / math.sqrt(dim)
    for name in ("direction.maps.weight", "compression.weight", "target.map.weight"):
        weight = dict(residual.named_parameters())[name].detach()
        assert abs(float(weight.std()) / std - 1) < 4 / math.sqrt(2 * weight.numel()), name
        assert abs(float(weight.mean())) < 4 * std / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("gate", ["linear", "two_layer"])
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("share", [0.0005, 0.05, 0.5, 0.95, 0.9995])
def test_gates_start_at_their_setting(gate, share, most):
    """The output bias is logit(beta0 / R)."""
    start = max(LEAST_GATE, min(most * share, most - LEAST_GATE))
    bias = parameters(gate=gate, gate_init=start, gate_range=most)["gate.outer.bias"]
    odds = math.log(start / most) - math.log(1 - start / most)
    near(bias.detach(), torch.tensor([odds], dtype=torch.float32), tol=1e-6)
    assert float(most * torch.sigmoid(bias.detach().double())) == pytest.approx(start, rel=1e-5)


@pytest.mark.parametrize("start", [LEAST_GATE, 2 - LEAST_GATE])
def test_gates_learn_from_the_ends_of_their_range(start):
    """Gradient descent opens them; from where they used to start for 0 and 2, it does not."""
    learned = DeltaStream(D, V, seed=0, gate_init=start, rule="delta").wrap().gate.outer.bias

    def trained(bias):
        for _ in range(2000):
            beta = 2 * torch.sigmoid(bias)
            (slope,) = torch.autograd.grad((beta - 1).square().sum(), bias)
            bias = (bias - slope).detach().requires_grad_()
        return (2 * torch.sigmoid(bias)).item()

    assert trained(learned) == pytest.approx(1.0, abs=1e-3)
    end = 2e-6 if start < 1 else 2 - 2e-6
    assert abs(trained(torch.tensor([math.log(end / (2 - end))], requires_grad=True)) - 1) > 0.99


def test_erase_gates_start_at_their_own_setting():
    for rule in ("additive_erase", "two_gate"):
        bias = parameters(rule=rule, gate_init=1.5, erase_init=0.4)["erase_gate.outer.bias"]
        assert float(2 * torch.sigmoid(bias.detach())) == pytest.approx(0.4, rel=1e-5)


def test_an_affine_target_starts_at_its_setting():
    """v0 at `target_init`, and W as that of `linear`: same name, same seed."""
    affine, linear = parameters(target="affine", target_init=-0.25, seed=3), parameters(seed=3)
    assert affine["target.level"].tolist() == [-0.25] * V
    assert torch.equal(affine["target.map.weight"], linear["target.map.weight"])


@pytest.mark.parametrize("compression", ["channel", "channel_conv", "token"])
@pytest.mark.parametrize("causal", [False, True])
def test_compression_starts_as_the_mean_over_value_channels(compression, causal):
    if causal and compression != "channel_conv":
        pytest.skip("only the convolution along channels pads")
    options = {"compression": compression, "compression_kernel": 3, "compression_causal": causal, "norm": "none"}
    stream = DeltaStream(D, seed=0, **vars(ResidualConfig(value_channels=V, **options)))
    state = randn(2, 5, V, D).float()
    near(stream.reduce(state), state.mean(-2), tol=1e-6)
    near(stream.wrap().open(state)[0], state.mean(-2), tol=1e-6)


def test_embedding_convolution_starts_as_repeat():
    x = randn(2, 5, D).float()
    convolution, repeat = (
        DeltaStream(D, V, seed=0, expansion=kind, rule="delta").expand(x) for kind in ("embedding_conv", "repeat")
    )
    assert torch.equal(convolution, repeat)


def test_initialise_leaves_foreign_layers_as_they_are():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = copy.deepcopy(module.state_dict())
    initialise(module, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_every_parameter_gets_a_gradient():
    for rule in RULES:
        residual = DeltaStream(D, V, seed=0, rule=rule).wrap(nn.Linear(D, D))
        residual(randn(2, V, D).float()).square().sum().backward()
        assert [name for name, p in residual.named_parameters() if p.grad is None or not p.grad.any()] == []

"""Every rule and every kind of part against the dense recomputation of helpers.py: values and all gradients in fp64.

The recomputation reads a residual's parameters by name, so a parameter that is missing, unused or used for something
else is an error here.
"""

from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepdelta import DeltaResidual, DeltaStream, ResidualConfig, UserError, use_backend
from helpers import compressed, dense_residual, expanded, gradients, near, perturb, randn

RULES = ["delta", "write_only", "erase_only", "additive", "additive_erase", "two_gate"]
DIM = 6


def residual_of(seed: int = 0, **options: Any) -> DeltaResidual:
    """A residual with every parameter moved away from its start, in fp64."""
    config = ResidualConfig(**{"gate_hidden": 3, "direction_hidden": 4} | options)
    stream = DeltaStream(DIM, seed=seed, **vars(config))
    residual = stream.wrap().double()
    perturb(residual, seed)
    return residual


def same_as_dense(residual: DeltaResidual, batch: tuple[int, ...] = (2, 6), seed: int = 0) -> None:
    """Value, and the gradients of the state, of the branch and of every parameter."""
    config, names = residual.config, [name for name, _ in residual.named_parameters()]
    state = randn(*batch, config.value_channels, DIM, seed=seed).requires_grad_()
    branch = randn(DIM, DIM, seed=seed + 1).requires_grad_()
    inputs = [state, branch, *residual.parameters()]
    c, close = residual.open(state)
    actual = close(torch.sin(c @ branch))
    expected = dense_residual(config, dict(residual.named_parameters()), state, lambda c: torch.sin(c @ branch))
    near(actual, expected, 1e-9)
    for name, one, two in zip(
        ["state", "branch", *names], gradients(actual, inputs), gradients(expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, channels):
    same_as_dense(residual_of(rule=rule, value_channels=channels))


KINDS: list[dict[str, Any]] = [
    *({"direction_norm": norm, "rule": rule} for norm in ("operator", "bounded", "free") for rule in RULES[:3]),
    *(
        {"target": target}
        for target in ("linear", "affine", "scaled_sigmoid", "linear_input", "constant", "magnitude", "branch")
    ),
    {"target": "scaled_sigmoid", "target_scale": 1.5, "value_channels": 1},
    {"target": "constant", "target_value": -0.7, "value_channels": 1},
    {"target": "magnitude", "direction_norm": "bounded", "rank": 2},
    {"target": "affine", "rank": 2, "rule": "write_only"},
    {"target": "affine", "gate": "two_layer"},
    *({"direction": "pooled", "target": "branch", "direction_pool": pool} for pool in ("mean", "flatten", "attention")),
    {"direction": "pooled", "target": "branch", "direction_pool": "attention", "direction_norm": "operator", "rank": 2},
    {"direction": "pooled", "target": "branch", "value_channels": 1},
    *({"compression": "token", "value_channels": 1, "rule": rule} for rule in ("delta", "additive")),
    {"gate": "two_layer"},
    {"gate": "two_layer", "gate_hidden_bias": False, "value_channels": 1},
    {"gate": "constant", "gate_init": 1.7},
    {"gate": "constant", "rule": "two_gate", "gate_init": 0.3, "erase_init": 1.2},
    *({"gate_per_channel": True, "rule": rule} for rule in RULES if rule != "additive"),
    {"gate_per_channel": True, "gate": "two_layer", "rank": 3},
    {"rule": "additive_erase", "plain_start": True},
    {"rule": "additive_erase", "plain_start": True, "gate_per_channel": True, "gate": "two_layer"},
    {"rule": "additive_erase", "plain_start": True, "gate": "constant", "erase_init": 1.3},
    *({"gate_range": 1, "gate_init": 0.4, "rule": rule} for rule in RULES),
    {"gate_range": 1, "gate_init": 0.4, "gate": "two_layer"},
    {"gate_range": 1, "rule": "additive_erase", "plain_start": True},
    *({"rule": "additive_erase", "erase_blocks": DIM, "value_channels": channels} for channels in (1, 3)),
    {"rule": "additive_erase", "erase_blocks": 2, "plain_start": True},
    {"rule": "additive_erase", "erase_blocks": 2, "plain_start": True, "gate": "constant", "erase_init": 1.3},
    {"rule": "additive_erase", "erase_blocks": 2, "gate": "two_layer", "gate_range": 1},
    {"compression": "channel_conv", "compression_kernel": 3},
    {"compression": "channel_conv", "compression_kernel": 2, "compression_init": "random"},
    {"compression": "channel_conv", "compression_kernel": 1},
    {"compression": "channel_conv", "compression_kernel": 3, "compression_causal": True},
    {"compression": "channel_conv", "compression_kernel": 4, "value_channels": 8},
    {"compression": "token"},
    {"compression": "token", "compression_kernel": 1, "rule": "write_only"},
    {"compression": "token", "compression_kernel": 9, "compression_init": "random"},
    *({"rule": "channels", "gate": gate, "gate_init": 0.7} for gate in ("linear", "two_layer", "constant")),
    {"rule": "channels", "compression": "token", "compression_init": "random"},
    {"norm": "none"},
    {"norm": "none", "rule": "two_gate", "value_channels": 1},
    {"norm_eps": 0.5},
    {"direction_eps": 0.5},
    {"direction_eps": 0.5, "rule": "additive_erase"},
]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_kinds_of_parts(options):
    same_as_dense(residual_of(**{"value_channels": 3, **options}))


FUSED: list[dict[str, Any]] = [
    *({"target": "affine", "rule": rule, "value_channels": v} for rule in ("delta", "write_only") for v in (1, 3)),
    {"gate_range": 1, "gate_init": 0.4, "value_channels": 3},
    {"gate_range": 1, "rule": "additive_erase", "plain_start": True, "value_channels": 3},
    {"erase_blocks": 3, "rule": "additive_erase", "plain_start": True, "value_channels": 3},
]


@pytest.mark.parametrize("options", FUSED, ids=lambda options: "-".join(map(str, options.values())))
def test_the_fused_step_takes_it(options):
    pytest.importorskip("numba")
    residual = residual_of(**options)
    use_backend(residual, "fused")
    assert (residual.linear_maps() is not None) == (residual.config.erase_blocks == 1)
    same_as_dense(residual)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_magnitude_target_writes_the_branch_output_bit_for_bit(size):
    """norm(h) k = h: no size is computed that a scale then takes back, and none leaves the range of fp32."""
    residual = DeltaStream(DIM, 3, seed=0, rule="write_only", target="magnitude", gate="constant").wrap()
    h = size * randn(4, DIM).float()
    new = residual.open(torch.zeros(4, 3, DIM))[1](h)  # c = 0, so that 1 + W c is 1
    assert torch.equal(new, h[:, None].expand(4, 3, DIM))


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Any legal combination of the named settings, from the configuration's own annotations."""
    options = {
        name: draw(st.sampled_from(choices))
        for name, kind in get_type_hints(ResidualConfig).items()
        if (choices := get_args(kind))
    }
    options["value_channels"] = draw(st.sampled_from([1, 2, 4]))
    options["rank"] = draw(st.sampled_from([1, 1, 2, 3]))
    options["compression_kernel"] = draw(st.integers(1, 4))
    options["gate_init"] = draw(st.sampled_from([0.3, 0.9]))
    options["erase_blocks"] = draw(st.sampled_from([1, 1, 2, 3, DIM]))
    for flag in ("gate_per_channel", "gate_hidden_bias", "compression_causal"):
        options[flag] = draw(st.booleans())
    # Else most would be refused.
    if options["rule"] not in RULES[:2]:
        options["direction"] = "branch"
    if options["direction"] == "pooled":
        options["target"] = "branch"
    if options["rule"] != "additive_erase":
        options["erase_blocks"] = 1
    if options["rule"] not in RULES[:3]:
        options |= {"rank": 1, "direction_norm": "unit"}
    try:
        ResidualConfig(**options)
    except UserError:
        assume(False)
    return options


@settings(max_examples=60)
@given(configurations(), st.sampled_from([(4,), (1, 3), (2, 5)]), st.integers(0, 99))
def test_any_combination(options, batch, seed):
    same_as_dense(residual_of(seed, **options), batch, seed)


@settings(max_examples=25)
@given(configurations(), st.integers(0, 99))
def test_expansion_and_reduction(options, seed):
    stream = DeltaStream(DIM, seed=seed, **vars(ResidualConfig(**options))).double()
    perturb(stream, seed)
    p = dict(stream.named_parameters())
    x = randn(2, 5, DIM, seed=seed).requires_grad_()
    inputs = [x, *p.values()]
    state = stream.expand(x)
    near(state, expanded(stream.config, p, x))
    actual, expected = (
        stream.reduce(torch.tanh(state)),
        compressed(stream.config, p, torch.tanh(expanded(stream.config, p, x)), "readout."),
    )
    near(actual, expected)
    for name, one, two in zip(["x", *p], gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("compression", ["channel", "token"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_axes(batch, compression):
    """No axis is special but the token axis of the parts over tokens: batched equals one by one."""
    if compression == "token" and not batch:
        pytest.skip("needs a token axis")
    residual = residual_of(compression=compression, value_channels=2)
    state = randn(*batch, 2, DIM)
    c, close = residual.open(state)
    batched = close(torch.cos(c))
    rows = state.reshape(-1, *state.shape[-3 if compression == "token" else -2 :])
    singles = []
    for row in rows:
        c, close = residual.open(row)
        singles.append(close(torch.cos(c)))
    near(batched, torch.stack(singles).reshape(state.shape))


def test_additive_at_one_value_channel_is_the_plain_residual_bit_for_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        residual = DeltaStream(DIM, 1, rule="additive", norm="none").wrap()
        x, h = randn(7, 1, DIM).to(dtype), randn(7, DIM, seed=1).to(dtype)
        c, close = residual.open(x)
        assert torch.equal(c, x[:, 0])
        assert torch.equal(close(h)[:, 0], x[:, 0] + h)
        assert [name for name, _ in residual.named_parameters()] == []


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rank", [2, 3])
def test_rank_is_the_compact_wy_form(rank, channels):
    """X' = X - K T (K^T X - V^T), T = (I + diag(beta) stril(K^T K))^-1 diag(beta), directions in index order."""
    residual = residual_of(rank=rank, value_channels=channels)
    p, state = dict(residual.named_parameters()), randn(channels, DIM, seed=3)
    c, close = residual.open(state)
    h = randn(DIM, seed=4)
    maps = p["direction.maps.weight"].reshape(rank, DIM, DIM)
    a_rD = maps @ h
    K = (a_rD / (a_rD.square().sum(-1, keepdim=True) + 1e-10).sqrt()).T
    beta = 2 * torch.sigmoid(p["gate.outer.weight"] @ c + p["gate.outer.bias"])
    V_rV = (p["target.map.weight"] @ c).reshape(rank, channels)
    T = torch.linalg.inv(torch.eye(rank, dtype=c.dtype) + torch.diag(beta) @ torch.tril(K.T @ K, -1)) @ torch.diag(beta)
    X_DV = state.T
    near(close(h), (X_DV - K @ T @ (K.T @ X_DV - V_rV)).T)


def confined(residual: DeltaResidual, state: Tensor, h: Tensor) -> Tensor:
    """What the rewrite changes, with the part along h removed."""
    delta = residual.open(state)[1](h) - state
    unit_h = h / h.norm(dim=-1, keepdim=True)
    return delta - (delta * unit_h[..., None, :]).sum(-1, keepdim=True) * unit_h[..., None, :]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_changes_the_state_along_the_branch_output_only(rule):
    residual = residual_of(rule=rule, value_channels=3)
    off = confined(residual, randn(6, 3, DIM), randn(6, DIM, seed=1))
    near(off, torch.zeros_like(off))


def test_identities_between_rules():
    """At equal parameters: delta = write_only + erase_only - identity, at rank 1."""
    state, h, results = randn(6, 3, DIM), randn(6, DIM, seed=1), {}
    source = residual_of(value_channels=3)
    for rule in RULES[:3]:
        residual = residual_of(rule=rule, value_channels=3)
        residual.load_state_dict({name: source.state_dict()[name] for name in residual.state_dict()})
        results[rule] = residual.open(state)[1](h)
    near(results["delta"], results["write_only"] + results["erase_only"] - state)

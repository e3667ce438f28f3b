"""The recorder: its values against a dense recomputation, and that without one nothing is computed for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepdelta import DeltaResidual, DeltaStream, ResidualConfig, RewriteRecord, recording
from helpers import (
    compressed,
    direction_parts,
    direction_vectors,
    gate_values,
    near,
    normed,
    outer,
    perturb,
    randn,
    target_values,
)

D, V = 5, 3
RULES = ["delta", "write_only", "erase_only", "additive", "additive_erase", "two_gate"]


def residual_of(**options: Any) -> DeltaResidual:
    options = {"value_channels": V, "gate_hidden": 3, "direction_hidden": 4, **options}
    residual = DeltaStream(D, seed=0, **vars(ResidualConfig(**options))).wrap().double()
    perturb(residual)
    return residual


def recorded(residual: DeltaResidual, state: Tensor, h: Tensor) -> tuple[Tensor, list[RewriteRecord]]:
    records: list[RewriteRecord] = []
    with recording(residual, lambda name, record: records.append(record)):
        new = residual.open(state)[1](h)
    return new, records


def read_and_cosine(state: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    read = torch.einsum("...vd,...d->...v", state, k)
    return read, read / (state.norm(dim=-1) * k.norm(dim=-1, keepdim=True))


VARIANTS: list[dict[str, Any]] = [
    *({"rule": rule} for rule in RULES),
    *({"rule": rule, "value_channels": 1} for rule in RULES),
    {"rank": 3},
    {"rank": 2, "direction_norm": "operator", "target": "magnitude"},
    *({"rule": rule, "target": "magnitude", "direction_eps": 0.5} for rule in ("delta", "write_only")),
    *({"direction_norm": norm, "rule": "delta"} for norm in ("operator", "bounded", "free")),
    {"direction_norm": "operator", "rule": "write_only", "direction_eps": 0.5},
    {"gate_per_channel": True, "rule": "two_gate"},
    {"gate_per_channel": True, "rank": 2},
    {"rule": "additive_erase", "plain_start": True},
    {"gate": "constant", "gate_init": 1.3},
    {"direction": "pooled", "target": "branch", "direction_pool": "attention"},
    {"direction_eps": 0.5},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_values_against_a_dense_recomputation(options):
    residual = residual_of(**options)
    config, p = residual.config, {name: tensor.detach() for name, tensor in residual.named_parameters()}
    state, h = randn(2, 4, config.value_channels, D), randn(2, 4, D, seed=1)
    new, records = recorded(residual, state, h)
    x_in = compressed(config, p, state)
    c = normed(config, p, x_in)
    along_branch = config.rule in ("additive", "additive_erase", "two_gate")
    vectors = [h] if along_branch else direction_vectors(config, p, state, h)
    has_target = config.rule in ("delta", "write_only")
    targets = target_values(config, p, x_in, c, h, vectors) if has_target else [None] * config.rank
    betas: list[Tensor | None] = [None]
    erases: list[Tensor | None] = [None]
    if config.rule == "additive_erase":
        name = "erase_gate" if "erase_gate.outer.bias" in p else "gate"
        betas = erases = gate_values(config, p, c, name, config.erase_init)
    elif config.rule == "two_gate":
        betas = gate_values(config, p, c, "gate", config.gate_init)
        erases = gate_values(config, p, c, "erase_gate", config.erase_init)
    elif config.rule != "additive":
        betas = gate_values(config, p, c, "gate", config.gate_init)
        erases = [None] * config.rank if config.rule == "write_only" else betas
    assert len(records) == config.rank
    for record, a, target, beta, erase in zip(records, vectors, targets, betas, erases, strict=True):
        k, along = direction_parts(config, a)
        read, cosine = read_and_cosine(state, k)
        near(record.read, read)
        near(record.cosine, cosine)
        near(record.norm, k.norm(dim=-1))
        near(record.branch_norm, (a.square().sum(-1) + config.direction_eps**2).sqrt())
        columns = config.value_channels if config.gate_per_channel else 1
        for value, expected in ((record.beta, beta), (record.erase, erase)):
            assert (value is None) == (expected is None)
            if value is not None:
                assert value.shape == (2, 4, columns)
                near(value.expand(expected.shape), expected)
        assert (record.target is None) == (target is None)
        if target is not None:
            # The write as it happened is beta * target along k.
            near(outer(record.target, k), outer(target, along))
        assert not any(value.requires_grad for value in record if value is not None)
        change = torch.zeros_like(read) if target is None else record.beta * record.target
        state = state + outer(change if record.erase is None else change - record.erase * record.read, k)
    if not along_branch:
        near(new, state)  # the records alone retrace the rewrite


@pytest.mark.parametrize("rule", RULES)
def test_recording_changes_nothing(rule):
    residual = residual_of(rule=rule)
    state, h = randn(4, V, D), randn(4, D, seed=1)
    expected = residual.open(state)[1](h)
    assert torch.equal(recorded(residual, state, h)[0], expected)
    assert torch.equal(residual.open(state)[1](h), expected)


@pytest.mark.parametrize("rule", RULES)
def test_zero_states_and_directions_have_cosine_zero(rule):
    residual = residual_of(rule=rule)
    for state, h in ((torch.zeros(4, V, D).double(), randn(4, D)), (randn(4, V, D), torch.zeros(4, D).double())):
        record = recorded(residual, state, h)[1][0]
        assert torch.equal(record.cosine, torch.zeros(4, V).double())
        assert torch.equal(record.read, torch.zeros(4, V).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_records_are_wide(rule, dtype):
    residual = residual_of(rule=rule).to(dtype)
    record = recorded(residual, randn(4, V, D).to(dtype), randn(4, D, seed=1).to(dtype))[1][0]
    for name in ("beta", "erase", "read", "norm", "branch_norm", "cosine"):
        value = getattr(record, name)
        assert value is None or value.dtype == torch.float32, name
    assert (record.cosine.abs() <= 1 + 1e-5).all()


class Pair(nn.Module):
    """Two residuals, the second of rank 2, inside a container."""

    def __init__(self) -> None:
        super().__init__()
        self.first = DeltaStream(D, V, seed=0, rule="delta").wrap(nn.Identity())
        self.inner = nn.Sequential(DeltaStream(D, V, seed=1, rank=2, rule="delta").wrap(nn.Identity()))

    def forward(self, state: Tensor) -> Tensor:
        return self.inner(self.first(state))


def test_names_and_order():
    names: list[str] = []
    module = Pair()
    with recording(module, lambda name, record: names.append(name)):
        module(randn(2, V, D).float())
    assert names == ["first", "inner.0", "inner.0"]


def test_nothing_is_recorded_outside_even_after_an_error():
    module, calls = Pair(), []
    with pytest.raises(RuntimeError, match="stop"), recording(module, lambda name, record: calls.append(name)):
        module(randn(2, V, D).float())
        raise RuntimeError("stop")
    module(randn(2, V, D).float())
    assert len(calls) == 3


def test_of_contexts_within_one_another_the_innermost_records():
    module, state, outer, inner = Pair(), randn(2, V, D).float(), [], []
    with recording(module, lambda name, record: outer.append(name)):
        with recording(module.inner, lambda name, record: inner.append(name)):
            module(state)
        assert (outer, inner) == (["first"], ["0", "0"])
        module(state)
    module(state)
    assert (outer, inner) == (["first", "first", "inner.0", "inner.0"], ["0", "0"])


class Operations(TorchDispatchMode):
    """The name of every operation that runs, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(residual: DeltaResidual, state: Tensor, h: Tensor) -> list[str]:
    with Operations() as mode:
        torch.autograd.grad(residual.open(state)[1](h).sum(), [h, *residual.parameters()])
    return mode.names


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("direction_norm", ["unit", "operator", "bounded", "free"])
def test_off_means_no_extra_operation(rule, direction_norm):
    if direction_norm != "unit" and rule in ("additive", "additive_erase", "two_gate"):
        pytest.skip("refused by the configuration: these rules write h exactly and take the unit direction alone")
    residual = residual_of(rule=rule, direction_norm=direction_norm)
    state, h = randn(4, V, D), randn(4, D, seed=1).requires_grad_()
    never = operations(residual, state, h)
    with recording(residual, lambda name, record: None):
        on = operations(residual, state, h)
    after = operations(residual, state, h)
    assert never == after
    assert len(on) > len(never)
    # What only a recorder needs is not among them: sizes of the state and the guard of the cosine.
    assert not any(part in name for name in never for part in ("vector_norm", "where"))


def test_the_plain_residual_is_one_addition():
    residual = DeltaStream(D, 1, rule="additive", norm="none").wrap()
    x, h = randn(4, 1, D), randn(4, D, seed=1)
    with Operations() as mode, torch.no_grad():
        residual.open(x)[1](h)
    computing = [name for name in mode.names if not any(view in name for view in ("squeeze", "alias", "view"))]
    assert computing == ["aten.add.Tensor"]


@pytest.mark.parametrize("direction_norm", ["operator", "bounded", "free"])
def test_the_size_of_the_branch_is_computed_for_those_who_use_it(direction_norm):
    """With a linear target and no recorder, sqrt(|h|^2 + eps^2) has no use under these norms."""
    residual = residual_of(direction_norm=direction_norm, norm="none")
    with torch.no_grad():
        close = residual.open(randn(4, V, D))[1]
        with Operations() as mode:
            close(randn(4, D, seed=1))
    assert sum("sqrt" in name for name in mode.names) == (0 if direction_norm == "free" else 1)

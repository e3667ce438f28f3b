"""Every legal combination of settings works, every other is refused by the table that says why.

The suite takes enough combinations to hold every legal pair of values; `make matrix` takes them all.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from deepdelta import GPT, GPTConfig, ResidualConfig, UserError
from deepdelta.nn.config import ILLEGAL
from helpers import perturb
from settings_matrix import (
    AXES,
    EXTENSIONS,
    SMALL,
    STARTS,
    Combination,
    Partial,
    combinations,
    effective,
    illegal,
    legal,
    pairs,
    pairwise,
)

ALL = AXES | EXTENSIONS | STARTS
DECIDING = {name: ALL[name] for name in ("direction_norm", "gate_per_channel", "compression_causal")}
PAIRWISE = pairwise(ALL)
TOKENS = 6


def model(combination: Combination, seed: int = 0) -> GPT:
    residual = ResidualConfig(**SMALL, **combination)
    return GPT(
        GPTConfig(vocab_size=11, context=TOKENS, layers=1, heads=2, dim=8, init_factor=1.0, residual=residual), seed
    )


def label(combination: Combination) -> str:
    return "-".join(str(value) for value in combination.values())


def check(combination: Combination) -> None:
    """Built, causal, saved and loaded, trained for two steps with a gradient for every parameter."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    made = model(combination)
    perturb(made)  # or identities, means and zeros at the start would hide what they leave out
    check_causal(made, ids)
    check_saved(made, ids, combination)
    check_training(made, ids, combination)


@torch.no_grad()
def check_causal(made: GPT, ids: Tensor) -> None:
    before = made(ids).logits
    assert before.isfinite().all()
    for token in (2, TOKENS - 1):
        changed = ids.clone()
        changed[:, token] = (changed[:, token] + 1) % 11
        after = made(changed).logits
        assert after[:, :token].equal(before[:, :token]), f"logits before token {token} depend on it"
        assert not torch.isclose(after[:, token:], before[:, token:], atol=1e-7).all(-1).any()


def check_training(made: GPT, ids: Tensor, combination: Combination) -> None:
    """Two steps against the gradient, each lowering the loss by as much as the gradient says, in fp64."""
    made.double()
    losses = []
    for step in range(3):
        loss = F.cross_entropy(made(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        if step == 2:
            break
        made.zero_grad()
        loss.backward()
        check_gradients(made, combination)
        square = sum(parameter.grad.square().sum() for parameter in made.parameters())
        with torch.no_grad():
            for parameter in made.parameters():
                parameter -= 1e-6 / square * parameter.grad
    assert losses[0] - losses[1] == pytest.approx(1e-6, rel=0.1)
    assert losses[1] - losses[2] == pytest.approx(1e-6, rel=0.1)


def check_gradients(made: GPT, combination: Combination) -> None:
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), name
        largest = parameter.grad.abs().max().item()
        if unread(name, combination):
            assert largest < 1e-6, f"{name} is thought to be without effect"
        else:
            assert largest > 1e-9, f"{name} has a gradient of zero"


def unread(name: str, combination: Combination) -> bool:
    """Attention over value channels that are all the same: its query changes nothing."""
    if not name.endswith("direction.query"):
        return False
    repeated = combination["expansion"] == "repeat" and name.startswith("layers.0.attention")
    return combination["value_channels"] == 1 or repeated


@torch.no_grad()
def check_saved(made: GPT, ids: Tensor, combination: Combination) -> None:
    again = model(combination, seed=1)
    assert not again(ids).logits.equal(made(ids).logits)
    again.load_state_dict(load(save(made.state_dict())))
    assert again(ids).logits.equal(made(ids).logits)


@pytest.mark.parametrize("combination", PAIRWISE, ids=label)
def test_pairs(combination):
    check(combination)


def test_every_legal_pair_is_among_them():
    held = set().union(*map(pairs, PAIRWISE))
    possible = set().union(*map(pairs, legal(AXES)))
    assert possible <= held
    assert all(not illegal(combination) for combination in PAIRWISE)
    for name, values in ALL.items():
        assert {combination[name] for combination in PAIRWISE} == set(values)
        for other, others in ALL.items():
            for value, another in product(values, others) if other > name else ():
                if ((name, value), (other, another)) not in held:
                    assert next(legal(ALL, {name: value, other: another}), None) is None


@pytest.mark.parametrize("combination", PAIRWISE, ids=label)
def test_settings_that_others_make_irrelevant_change_nothing(combination):
    one, other = model(combination).state_dict(), model(effective(combination)).state_dict()
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    assert model(combination)(ids).logits.equal(model(effective(combination))(ids).logits)


def test_how_many_are_legal():
    """Counted by hand: V = 1 has one expansion and two compressions, V = 3 two by three; three gates.

    delta and write_only: seven targets along the branch, one along a pooled direction, ranks 1 and 2; erase_only: the
    branch alone, its seven targets without meaning; the three rules that write h: rank 1 alone. channels: V = 3.
    """
    shapes_and_gates = 3 * (2 + 2 * 3)
    expected = shapes_and_gates * (2 * (7 + 1) * 2 + 7 * 2 + 3 * 7)
    assert sum(1 for _ in legal(AXES)) == expected + 3 * (2 * 3) * 7 == 1734


def check_refusals(axes: Mapping[str, tuple[Any, ...]]) -> set[str]:
    """Every combination is built, or refused with the first entry of the table that holds; the entries met."""
    met = set()
    for combination in combinations(axes):
        holding = [entry for entry in ILLEGAL if entry.holds(Partial(DEFAULTS | combination))]
        try:
            ResidualConfig(**SMALL, **combination)
        except UserError as error:
            assert holding, f"{combination} is refused without an entry: {error}"
            assert str(error) == f"{holding[0].settings}: {holding[0].reason}", combination
            met.add(holding[0].settings)
        else:
            assert not holding, f"{combination} is built although {holding[0].settings}"
    return met


DEFAULTS = {name: getattr(ResidualConfig(), name) for name in ALL}


def test_refused_by_the_table_alone():
    check_refusals(AXES)


@pytest.mark.matrix
def test_refused_by_the_table_alone_whole():
    met = check_refusals(AXES | DECIDING | {name: STARTS[name] for name in ("compression_init", "plain_start")})
    assert met == {entry.settings for entry in ILLEGAL} - {
        # No kernel here is longer than the value channels, but where there is one channel, which comes first.
        "compression='channel_conv' with compression_kernel > value_channels"
    }


GROUPS = {
    tuple(combination[name] for name in ("rule", "direction", "target", "gate"))
    for combination in map(effective, legal(AXES))
}


@pytest.mark.matrix
@pytest.mark.parametrize(("rule", "direction", "target", "gate"), sorted(GROUPS))
def test_whole(rule, direction, target, gate, capsys, unchecked):
    """Every legal combination but those that only repeat another under settings without effect."""
    chosen = {"rule": rule, "direction": direction, "target": target, "gate": gate}
    count = 0
    for combination in legal(AXES | EXTENSIONS, chosen):
        if effective(combination) == combination:
            try:
                check(combination)
            except Exception as error:
                error.add_note(f"with {combination}")
                raise
            count += 1
    assert count
    with capsys.disabled():
        print(f" {count:,} combinations", end="")

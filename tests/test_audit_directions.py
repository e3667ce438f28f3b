"""Other directions for an erase, against cosines taken one by one from captured states."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta.lab.audit.audit import audit
from deepdelta.lab.audit.directions import chance
from deepdelta.models import GPT
from test_audit import NAMES, WINDOWS, captured, gpt


def cosine(x: Tensor, y: Tensor) -> float:
    size = float(x.norm() * y.norm())
    return abs(float(x @ y)) / size if size else 0.0


@pytest.mark.parametrize(
    "options", [{"rule": "additive", "value_channels": 1}, {"rule": "delta"}], ids=["plain", "delta"]
)
def test_cosines_against_captured_states(options: dict[str, Any]) -> None:
    model = gpt(**options)
    states = captured(model)
    found = {one.name: {other.name: other for other in one.alternatives} for one in audit(model, WINDOWS).residuals}
    for index, name in enumerate(NAMES):
        state_NVD, h_ND, _ = states[name]
        expected: dict[str, list[float]] = {"heads": []}
        for n, row_VD in enumerate(state_NVD):
            for x_D in row_VD:
                expected["heads"] += [cosine(x_D[:4], h_ND[n, :4]), cosine(x_D[4:], h_ND[n, 4:])]
            if index >= 2:
                pairs = zip(row_VD, states[NAMES[index - 2]][0][n], strict=True)
                expected.setdefault("snapshot", []).extend(cosine(x_D, earlier_D) for x_D, earlier_D in pairs)
            if name.endswith("attention"):
                out: Tensor = model.get_submodule(name).branch.out.weight.detach()  # type: ignore[union-attr,assignment]
                read_D = torch.linalg.solve(out, h_ND[n])  # the output map undone
                expected.setdefault("value", []).extend(cosine(x_D, read_D) for x_D in row_VD)
        assert found[name].keys() == expected.keys()
        for kind, values in expected.items():
            assert found[name][kind].cosine == pytest.approx(sum(values) / len(values), rel=1e-6)
            assert found[name][kind].chance == chance(4 if kind == "heads" else 8)


def test_a_model_is_left_as_it_was() -> None:
    model = gpt(rule="delta")
    audit(model, WINDOWS)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_state_of_zeros_has_no_cosine() -> None:
    model: GPT = gpt(rule="additive", value_channels=1)
    with torch.no_grad():
        model.embedding.weight.zero_()
    first = audit(model, WINDOWS).residuals[0]
    assert {other.cosine for other in first.alternatives} == {0.0}


@pytest.mark.parametrize("width", [1, 2, 3, 16, 64, 768])
def test_chance_is_the_mean_over_random_directions(width: int) -> None:
    drawn = torch.randn(200_000 // width + 20_000, width, generator=torch.Generator().manual_seed(0)).double()
    cosines = drawn[:, 0].abs() / drawn.norm(dim=1)
    error = float(cosines.std()) / math.sqrt(len(cosines))
    assert chance(width) == pytest.approx(float(cosines.mean()), abs=5 * error + 1e-12)

"""The words task: groups against permutations, exact solutions at length 10,000, the tracker against its rewrites."""

import doctest
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deepdelta import UserError
from deepdelta.lab.tasks import load_task
from deepdelta.lab.tasks.groups import GROUPS, group, reflections
from deepdelta.lab.tasks.words import Tracker, WordsSettings, exact, products, solve, track
from helpers import near, perturb, randn

TASK = load_task("words")
POINTS = {"Z2": 2, "S3": 3, "D4": 4, "A5": 5}
WIDTHS = {"Z2": 1, "S3": 2, "D4": 2, "A5": 3}
QUICK = {"length": 8, "steps": 200, "batch_size": 64, "rank": 1, "dim": 2, "value_channels": 1}


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def expected_elements(name: str) -> set[tuple[int, ...]]:
    every = set(itertools.permutations(range(POINTS[name])))
    if name == "D4":  # corners that face each other keep facing each other
        return {p for p in every if {frozenset(p[:3:2]), frozenset(p[1::2])} == {frozenset((0, 2)), frozenset((1, 3))}}
    return {p for p in every if even(p)} if name == "A5" else every


def composed(name: str, word: list[int]) -> list[int]:
    """The number of g_t .. g_1 after each symbol, from what the permutations do to the points."""
    elements = group(name).elements
    number = {permutation: i for i, permutation in enumerate(elements)}
    points = list(range(POINTS[name]))
    answers = []
    for symbol in word:
        points = [elements[symbol][point] for point in points]
        answers.append(number[tuple(points)])
    return answers


def words(name: str, count: int, length: int, seed: int = 0) -> torch.Tensor:
    draw = random.Random(seed)
    symbols = len(group(name).elements)
    return torch.tensor([[draw.randrange(symbols) for _ in range(length)] for _ in range(count)])


# Groups


@pytest.mark.parametrize("name", GROUPS)
def test_the_elements_and_their_table(name):
    found = group(name)
    assert len(found.elements) == {"Z2": 2, "S3": 6, "D4": 8, "A5": 60}[name]
    assert set(found.elements) == expected_elements(name)
    assert found.elements[0] == tuple(range(POINTS[name]))
    for a, b in itertools.product(range(len(found.elements)), repeat=2):
        assert composed(name, [b, a])[-1] == found.table[a, b]


@pytest.mark.parametrize("name", GROUPS)
def test_the_matrices_are_a_faithful_orthogonal_representation(name):
    found = group(name)
    width = WIDTHS[name]
    assert found.matrices.shape == (len(found.elements), width, width)
    products_of_matrices = np.einsum("aij,bjk->abik", found.matrices, found.matrices)
    np.testing.assert_allclose(products_of_matrices, found.matrices[found.table], atol=1e-12)
    gram = found.matrices @ found.matrices.swapaxes(1, 2)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(width), gram.shape), atol=1e-12)
    apart = np.abs(found.matrices[:, None] - found.matrices).max((-1, -2)) + np.eye(len(found.elements))
    assert apart.min() > 0.1


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_every_orthogonal_matrix_is_a_product_of_few_reflections(width):
    for seed in range(5):
        matrix = np.linalg.qr(randn(width, width, seed=seed).numpy())[0]
        made = np.eye(width)
        found = reflections(matrix)
        for k in found:
            made = (np.eye(width) - 2 * np.outer(k, k)) @ made
        np.testing.assert_allclose(made, matrix, atol=1e-9)
        assert len(found) <= width and (-1) ** len(found) == round(np.linalg.det(matrix))
    assert reflections(np.eye(width)) == []


# Exact solutions


@pytest.mark.usefixtures("unchecked")  # for the sake of time
@pytest.mark.parametrize("name", GROUPS)
def test_exact_solutions_at_length_10_000(name):
    solution = exact(name)
    found = words(name, 2, 10_000)
    assert solve(solution, found).tolist() == [composed(name, word) for word in found.tolist()]
    assert solution.state.shape == (1, WIDTHS[name])
    rewrites = solution.rewrites
    assert rewrites.directions.shape[1] == (1 if name == "Z2" else 2) and rewrites.feedback is None
    assert not rewrites.targets.any() and set(rewrites.gates.flatten().tolist()) <= {0.0, 2.0}
    for matrix, gates in zip(group(name).matrices, rewrites.gates, strict=True):
        reflects = np.linalg.det(matrix) < 0
        assert gates.count_nonzero() == (1 if reflects else 0 if np.allclose(matrix, np.eye(len(matrix))) else 2)


@pytest.mark.usefixtures("unchecked")
def test_parity_at_length_10_000_by_targets_that_see_the_state_and_gates_below_1():
    solution = exact("Z2", state_dependent=True)
    found = words("Z2", 2, 10_000)
    assert solve(solution, found).equal(found.cumsum(1) % 2)
    assert 0 < solution.rewrites.gates.max() < 1


@pytest.mark.parametrize("name", GROUPS)
def test_state_dependent_solutions_have_no_negative_eigenvalue(name):
    solution = exact(name, state_dependent=True, dtype=torch.float32)
    found = words(name, 3, 100)
    assert solve(solution, found).tolist() == [composed(name, word) for word in found.tolist()]
    assert (1 - solution.rewrites.gates).min() == 0.25


def test_the_example_of_the_page():
    page = Path(__file__).parents[1] / "docs" / "tasks.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("name", GROUPS)
def test_products(name):
    found = words(name, 3, 40)
    assert products(name, found).tolist() == [composed(name, word) for word in found.tolist()]


# The tracker


@pytest.mark.parametrize("target", ["symbol", "state"])
@pytest.mark.parametrize("gate_range", ["0-1", "0-2"])
@torch.no_grad()
def test_the_composed_layers_are_one_rewrite_after_the_other(target, gate_range):
    settings = WordsSettings(group="S3", target=target, gate_range=gate_range, dim=3, value_channels=2)
    tracker = Tracker(settings, torch.Generator().manual_seed(1))
    perturb(tracker)
    rewrites, found = tracker.rewrites(), words("S3", 4, 9)
    high = {"0-1": 1, "0-2": 2}[gate_range]
    assert rewrites.gates.min() >= 0 and rewrites.gates.max() <= high
    states = track(rewrites, tracker.start, found)
    read = F.relu(states.flatten(2) @ tracker.inner.T + tracker.bias) @ tracker.outer.T
    near(tracker(found), read, 1e-5)

    # The same once more, by dense matrices.
    eye, word = torch.eye(3), found[0].tolist()
    state = tracker.start
    for symbol in word:
        for k, v, beta, index in zip(*(part[symbol] for part in rewrites[:3]), (0, 1), strict=True):
            m = 0.0 if rewrites.feedback is None else rewrites.feedback[symbol, index]
            state = state @ (eye - beta * (1 - m) * torch.outer(k, k)) + beta * torch.outer(v, k)
    near(states[0, -1], state, 1e-5)


def test_gates_reach_both_ends():
    tracker = Tracker(WordsSettings(group="D4"), torch.Generator().manual_seed(0))
    tracker.logits.data.copy_(torch.linspace(-2, 2, tracker.logits.numel()).view_as(tracker.logits))
    gates = tracker.rewrites().gates
    assert gates.min() == 0 and gates.max() == 2 and ((gates > 0) & (gates < 2)).any()


def test_parity_is_learned_with_reflections_and_not_without():
    steps: list[tuple[int, int]] = []
    settings = TASK.settings_of("gate-0-2", QUICK)
    solved = TASK.run(settings, 100, lambda done, total: steps.append((done, total)))
    assert steps == [(step, 200) for step in range(1, 201)]
    assert solved["solved"] == 1 and solved["accuracy"] >= 0.99 and solved["failed"] == 0
    assert solved["eigenvalue_least"] < -0.9 and solved["layer_least"] < -0.9 and solved["negative"] > 0
    failed = TASK.run(TASK.settings_of("gate-0-1", QUICK), 100, quiet)
    assert failed["accuracy"] < 0.8 and failed["solved"] == 0
    assert failed["eigenvalue_least"] >= 0 and failed["negative"] == 0


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    settings = TASK.settings_of("state-target", QUICK | {"steps": 3, "group": "A5"})
    before = torch.random.get_rng_state()
    first, again, other = (TASK.run(settings, seed, quiet) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.random.get_rng_state().equal(before)


def test_conditions_share_the_recipe():
    assert [set(variant.changes) for variant in TASK.conditions.values()] == [
        {"gate_range"},
        {"gate_range"},
        {"gate_range", "target"},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "S4"}, "group: Input should be 'Z2', 'S3', 'D4' or 'A5', got 'S4'"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"rank": 5}, "rank must lie in \\[1, 4\\], got 5"),
        ({"gate_range": "0-1"}, "gate_range is what condition gate-0-2 of task words sets itself"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"gruop": "S3"}, "unknown key 'gruop'; did you mean 'group'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TASK.settings_of("gate-0-2", changes)


@pytest.mark.usefixtures("unchecked")
def test_ranges_of_unknown_name():
    with pytest.raises(UserError, match="gate_range must be one of 0-1, 0-2, got '0-3'"):
        WordsSettings(gate_range="0-3")


def test_groups_of_unknown_name():
    with pytest.raises(UserError, match=r"group must be one of Z2, S3, D4, A5, got 'Z3'"):
        group("Z3")

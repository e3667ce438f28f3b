"""The recall task: its data against a dictionary, its determinism, its errors, and that the model learns."""

import math

import pytest
import torch

from deepdelta import UserError
from deepdelta.lab.tasks import load_task
from deepdelta.lab.tasks.recall import RecallSettings, recall_batch

pytestmark = pytest.mark.usefixtures("unchecked_file")

TASK = load_task("recall")


def batch_of(seed: int = 0, **changes: int):
    settings = RecallSettings(**changes)
    return settings, recall_batch(settings, 64, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, {"keys": 2, "writes": 3, "values": 2}, {"keys": 7, "writes": 30}], ids=str)
def test_the_answers_are_what_a_dictionary_holds(changes):
    settings, batch = batch_of(**changes)
    for tokens, labels, overwritten in zip(
        batch.tokens.tolist(), batch.labels.tolist(), batch.overwritten.tolist(), strict=True
    ):
        held: dict[int, int] = {}
        times: dict[int, int] = {}
        for key, value in zip(tokens[0 : 2 * settings.writes : 2], tokens[1 : 2 * settings.writes : 2], strict=True):
            assert key < settings.keys <= value < settings.keys + settings.values
            held[key], times[key] = value, times.get(key, 0) + 1
        queries = tokens[2 * settings.writes :]
        assert sorted(queries) == sorted(held) == list(range(settings.keys))
        assert labels[2 * settings.writes :] == [held[key] for key in queries]
        assert overwritten[2 * settings.writes :] == [times[key] > 1 for key in queries]
        assert set(labels[: 2 * settings.writes]) == {-1} and not any(overwritten[: 2 * settings.writes])
        assert sum(count == 1 for count in times.values()) == settings.keys // 2


def test_every_key_is_overwritten_in_some_sequence():
    settings, batch = batch_of()
    assert set(batch.tokens[batch.overwritten].tolist()) == set(range(settings.keys))


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    settings = TASK.settings_of("delta", {"steps": 3, "depths": [1], "widths": [8], "test_sequences": 32})
    before = torch.random.get_rng_state()
    first, again, other = (TASK.run(settings, seed, lambda done, total: None) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.random.get_rng_state().equal(before)


def test_a_small_model_recalls_the_last_value():
    """Two keys and two values; a guess is right in half of the answers."""
    steps: list[tuple[int, int]] = []
    settings = TASK.settings_of(
        "delta",
        {"keys": 2, "values": 2, "writes": 4, "depths": [2], "widths": [32], "steps": 250, "lr": 0.01}
        | {"test_sequences": 256},
    )
    metrics = TASK.run(settings, 100, lambda done, total: steps.append((done, total)))
    assert metrics["accuracy_overwritten"] == metrics["accuracy_overwritten_d2_w32"]
    assert steps == [(step, 250) for step in range(1, 251)]
    assert metrics["accuracy_overwritten"] > 0.8 and metrics["accuracy_once"] > 0.8


@pytest.mark.parametrize("condition", TASK.conditions)
def test_every_depth_and_width_is_trained_and_counted(condition):
    tiny = {"depths": [1, 2], "widths": [8, 4], "steps": 2, "batch_size": 4, "test_sequences": 16}
    steps: list[tuple[int, int]] = []
    metrics = TASK.run(TASK.settings_of(condition, tiny), 3, lambda done, total: steps.append((done, total)))
    assert steps == [(step, 6) for step in range(1, 7)]
    for name in ("accuracy_overwritten", "accuracy_once", "loss"):
        by_point = [metrics[f"{name}_{point}"] for point in ("d1_w8", "d2_w8", "d1_w4")]
        assert math.isclose(metrics[name], sum(by_point) / 3)
    assert len(metrics) == 12 and len({metrics[f"loss_{point}"] for point in ("d1_w8", "d2_w8", "d1_w4")}) == 3


def test_conditions_differ_in_the_residual_only():
    plain = TASK.settings_of("additive")
    for condition, variant in TASK.conditions.items():
        assert set(variant.changes) == {"residual"}
        assert TASK.settings_of(condition).steps == plain.steps
    assert TASK.settings_of("delta-4", {"steps": 7, "residual": {"target": "magnitude"}}).residual.target == "magnitude"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"writes": 5}, "at least 6, got 5: raise writes or lower keys"),
        ({"keys": 1}, "keys must be at least 2"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"widths": [32, 33]}, "dim must be a multiple of heads"),
        ({"depths": []}, "depths must be different values, at least one"),
        ({"residual": {"target": "linaer"}}, "residual.target"),
        ({"key": 4}, "unknown key 'key'; did you mean 'keys'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TASK.settings_of("delta-4", changes)


def test_divergence_is_named():
    with pytest.raises(UserError, match="lower lr"):
        TASK.run(TASK.settings_of("additive", {"lr": 1e30, "steps": 20, "depths": [1]}), 0, lambda done, total: None)

"""The tabular task: its split against the table itself, its determinism, its errors, and that the model learns."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

from deepdelta import UserError
from deepdelta.lab.tasks import load_task
from deepdelta.lab.tasks.tabular import split_rows

TASK = load_task("tabular")
SMALL = {"depth": 2, "dim": 16, "steps": 60}


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def test_the_split_is_the_whole_table_once_each_row_standardised_by_the_training_rows():
    x, y = load_diabetes(return_X_y=True, scaled=False)
    data = split_rows(300, seed=5)
    assert data.train_x.shape == (300, 10) and data.test_x.shape == (142, 10)
    np.testing.assert_allclose(data.train_y.std(), 1, rtol=1e-5)
    np.testing.assert_allclose(data.train_x.mean(0), 0, atol=1e-5)
    # Every column is the table's but for a scale and an offset; these undone, the rows are the table's, each once.
    both = np.column_stack([torch.cat((data.train_x, data.test_x)), torch.cat((data.train_y, data.test_y))])
    table = np.column_stack([x, y])
    lines = [np.polyfit(np.sort(ours), np.sort(theirs), 1) for ours, theirs in zip(both.T, table.T, strict=True)]
    undone = np.column_stack([np.polyval(line, column) for line, column in zip(lines, both.T, strict=True)])
    apart = (np.abs(undone[:, None] - table) / np.ptp(table, axis=0)).max(-1)
    assert apart.min(-1).max() < 1e-4
    assert sorted(apart.argmin(-1)) == list(range(442))


def test_seeds_give_other_splits_and_the_same_seed_the_same():
    first, again, other = (split_rows(300, seed).test_y for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    settings = TASK.settings_of("delta-4", SMALL | {"steps": 3})
    before = torch.random.get_rng_state()
    first, again, other = (TASK.run(settings, seed, quiet) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("condition", ["additive", "delta-4"])
def test_a_small_model_beats_the_mean_by_a_margin(condition):
    """The mean of the training rows has an rmse of about 1, least squares of about 0.7."""
    found = TASK.run(TASK.settings_of(condition, SMALL), 100, quiet)
    assert found["rmse"] < 0.85
    data = split_rows(TASK.settings.train_rows, 100)
    assert data.test_y.square().mean().sqrt() > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_rows": 442}, "be less than 442, got 442"),
        ({"train_rows": 1}, "train_rows must be at least 2"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"lr": -1.0}, "lr must be greater than 0"),
        ({"depht": 3}, "unknown key 'depht'; did you mean 'depth'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TASK.run(TASK.settings_of("delta", changes), 0, quiet)

"""Training changes no number unasked: losses of every preset as they were when fingerprint.json was made.

To 1e-5, since another machine rounds otherwise; `make fingerprint BASE=COMMIT` compares two checkouts bit for bit.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepdelta import GPT, GPTConfig
from deepdelta.config import from_plain
from fingerprint import losses, read

ROWS = read(Path(__file__).with_name("fingerprint.json"))


def numbers(row: dict[str, Any], losses: list[str]) -> list[float]:
    assert len(losses) == 20, row["preset"]
    return [float.fromhex(loss) for loss in losses]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['preset']}-{row['seed']}-{row['backend']}")
def test_losses_are_as_they_were(row, tmp_path):
    found = losses(row["residual"], row["seed"], row["backend"], tmp_path)
    np.testing.assert_allclose(numbers(row, found), numbers(row, row["losses"]), rtol=1e-5)


@pytest.mark.parametrize("row", read(Path(__file__).with_name("state_dicts.json")), ids=lambda row: row["preset"])
def test_state_dicts_have_the_names_and_shapes_that_they_had(row):
    """A parameter's start is keyed by its full name, and checkpoints are read by it."""
    sizes = {"vocab_size": 11, "context": 8, "layers": 2, "heads": 2, "dim": 8}
    model = GPT(from_plain(GPTConfig, sizes | {"residual": row["residual"]}))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == row["shapes"]

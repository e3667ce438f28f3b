"""Training changes no number unasked: losses of every preset as they were when fingerprint.json was made.

To 1e-3, since another kind of processor sums in another order and 20 steps amplify that (2.4e-4 was seen);
`make fingerprint BASE=COMMIT` compares two checkouts on one machine bit for bit.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepdelta import GPT, GPTConfig
from deepdelta.config import from_plain
from fingerprint import BACKENDS, SEEDS, read

ROWS = read(Path(__file__).with_name("fingerprint.json"))


def numbers(row: dict[str, Any]) -> list[float]:
    assert len(row["losses"]) == 20, row["preset"]
    return [float.fromhex(loss) for loss in row["losses"]]


def test_losses_are_as_they_were(tmp_path):
    """One seed of each preset by the reference, the other by fused code. In a process without run-time type checks: all
    of it is checked elsewhere, and these are 30 trainings."""
    like, here = tmp_path / "like.json", tmp_path / "here.json"
    rows = [row for row in ROWS if row["seed"] == SEEDS[BACKENDS.index(row["backend"])]]
    like.write_text(json.dumps(rows), encoding="utf-8")
    script = Path(__file__).with_name("fingerprint.py")
    subprocess.run([sys.executable, script, "measure", here, "--like", like], check=True)
    found = read(here)
    assert len(found) == len(rows) == len(ROWS) / 2
    for row, made in zip(rows, found, strict=True):
        name = row["preset"], row["backend"]
        assert (made["preset"], made["backend"]) == name
        np.testing.assert_allclose(numbers(made), numbers(row), rtol=1e-3, err_msg=str(name))


@pytest.mark.parametrize("row", read(Path(__file__).with_name("state_dicts.json")), ids=lambda row: row["preset"])
def test_state_dicts_have_the_names_and_shapes_that_they_had(row):
    """A parameter's start is keyed by its full name, and checkpoints are read by it."""
    sizes = {"vocab_size": 11, "context": 8, "layers": 2, "heads": 2, "dim": 8}
    model = GPT(from_plain(GPTConfig, sizes | {"residual": row["residual"]}))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == row["shapes"]

"""Folders with a published checkpoint, for the tests of `deepdelta import`, and what its errors say."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deepdelta.cli import main
from test_oracle import vector


def checkpoint(folder: Path, name: str = "cc-ec", weights: str = "model.safetensors") -> Path:
    given = vector(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(given.config))
    if weights.endswith("safetensors"):
        save_file(given.parameters, folder / weights)
    else:  # their state dict: an OrderedDict in which the tied head stands beside the embedding
        state = OrderedDict(given.parameters)
        state["lm_head.weight"] = state["transformer.wte.weight"]
        torch.save(state, folder / weights)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    progress, found, message = capsys.readouterr().err.partition("error: ")
    assert found and "Traceback" not in progress + message
    return message

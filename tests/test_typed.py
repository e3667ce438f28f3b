"""What editors and type checkers know of the options, and that they know what the configurations have."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from mypy import api

from deepdelta import ResidualConfig, RetrofitConfig
from deepdelta.nn.stream import ResidualOptions
from deepdelta.retrofitting.config import RetrofitOptions

SETTINGS = """
[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-deepdelta.*]
follow_imports = silent
"""
IMPORTS = [
    "from torch import nn",
    "from deepdelta.nn import DeltaStream",
    "from deepdelta.retrofitting import retrofit",
]
RIGHT = [
    'DeltaStream(8, 4, "write_only", gate_init=0.5, target="constant", seed=0)',
    'DeltaStream(8, preset="ddl", channel_first=True, rank=2)',
    'retrofit(nn.Linear(2, 2), 2, gate="constant", seed=3)',
]
WRONG = [
    'DeltaStream(8, gate_inti=0.5)  # Unexpected keyword argument "gate_inti" for "DeltaStream"; did you',
    'DeltaStream(8, target="lineer")  # Argument "target" to "DeltaStream" has incompatible type "Literal[\'lineer\']"',
    'DeltaStream(8, 4, "dleta")  # Argument 3 to "DeltaStream" has incompatible type "Literal[\'dleta\']"',
    'DeltaStream(8, rank="two")  # Argument "rank" to "DeltaStream" has incompatible type "str"',
    'retrofit(nn.Linear(2, 2), trainable="some")  # Argument "trainable" to "retrofit" has incompatible type',
    'retrofit(nn.Linear(2, 2), sed=3)  # Unexpected keyword argument "sed" for "retrofit"',
]


@pytest.mark.parametrize(
    "options, config, apart",
    [
        (ResidualOptions, ResidualConfig, {"value_channels", "rule"}),
        (RetrofitOptions, RetrofitConfig, {"value_channels"}),
    ],
)
def test_the_options_are_the_fields(options: type, config: type, apart: set[str]) -> None:
    fields = {name: hint for name, hint in get_type_hints(config).items() if name in config.__dataclass_fields__}
    assert apart <= fields.keys()
    assert get_type_hints(options) == {name: hint for name, hint in fields.items() if name not in apart}


def test_a_type_checker_sees_every_option(tmp_path: Path) -> None:
    code, settings = tmp_path / "code.py", tmp_path / "mypy.ini"
    code.write_text("\n".join([*IMPORTS, *RIGHT, *WRONG]) + "\n")
    settings.write_text(SETTINGS)
    told, _, status = api.run([str(code), "--config-file", str(settings), "--cache-dir", str(tmp_path / "cache")])
    errors = [line for line in told.splitlines() if ": error: " in line]
    assert status == 1 and len(errors) == len(WRONG), told
    for number, (line, error) in enumerate(zip(WRONG, errors, strict=True), 1 + len(IMPORTS) + len(RIGHT)):
        assert error.startswith(f"{code}:{number}: error: {line.partition('# ')[2]}"), told


@pytest.mark.home
@pytest.mark.compatible("misspelt options are type errors to pyright, as to mypy", "pyright", "mypy")
def test_pyright_sees_them_too(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text("\n".join([*IMPORTS, *RIGHT, *WRONG]) + "\n")
    words = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(code)]
    told = subprocess.run(words, capture_output=True, text=True)
    found = json.loads(told.stdout)["generalDiagnostics"]
    errors = [one["range"]["start"]["line"] + 1 for one in found if one["severity"] == "error"]
    first = 1 + len(IMPORTS) + len(RIGHT)
    assert errors == [*range(first, first + len(WRONG))], told.stdout

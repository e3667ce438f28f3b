"""Releases of other packages: those that are tested, and one word about any other."""

import importlib.util
import re
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deepdelta import releases
from deepdelta.errors import require

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("package", "found", "told"),
    [
        ("transformers", "5.99.0.dev0", True),
        ("transformers", "5.24.7", False),
        ("transformers", "5.240.0", True),
        ("lm_eval", "0.4.9", True),
        ("lm_eval", "0.4.13", False),
        ("torchao", "0.20.0", True),
        ("torchao", "0.18.0+cpu", False),
        ("datasets", "5.9", False),
        ("datasets", "50.0", True),
        ("pyarrow", "25.0.0", True),
        ("peft", "0.22.0", True),
        ("numba", "0.61.0", False),
        ("safetensors", "0.1", False),
    ],
)
def test_another_release_is_warned_of_once_by_name(monkeypatch, package, found, told):
    monkeypatch.setattr(releases, "_checked", set())
    monkeypatch.setattr(releases, "version", lambda name: found)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        require("These", "extra", package)
        require("These", "extra", package)
    assert len(said) == told
    for one in said:
        tested = " and ".join(releases.TESTED[package])
        named = (
            f"deepdelta was tested with {package.replace('_', '-')} {tested}, got {found}; what it gives may be wrong."
        )
        assert str(one.message) == named


def test_what_is_tested_is_what_the_targets_install():
    files = (ROOT / "constraints.txt", ROOT / "constraints-hf4.txt")
    pinned = "\n".join(file.read_text(encoding="utf-8") for file in files if file.exists())
    for package, lines in releases.TESTED.items():
        held = set(re.findall(rf"^{package.replace('_', '-')}==(\S+)", pinned, re.M))
        assert len(held) == len(lines) and all(any(f"{one}.".startswith(f"{line}.") for one in held) for line in lines)


def test_every_package_of_an_extra_is_known_and_looked_at():
    """Of the extras that bring what the package itself imports."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    of_use = {name: extras[name] for name in extras.keys() - {"docs", "browser", "test", "home"}}
    brought = {Requirement(one).name.replace("-", "_") for needed in of_use.values() for one in needed}
    assert brought - {"deep_delta_learning"} | {"peft"} == releases.TESTED.keys()
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py") if path.stem != "releases")
    by_name = {"numba", "hyper_connections", "x_transformers", "tensorboard", "wandb"}  # from tables of their own
    for package in releases.TESTED.keys() - by_name:
        assert re.search(rf"(check_tested|require|_arrow)\([^)]*\"{package}\"", code), package

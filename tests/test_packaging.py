"""What the package says of itself is what it is; `make wheel` builds, checks and tries it."""

import re
import tomllib
from pathlib import Path

import yaml

import deepdelta

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == deepdelta.__version__ and citation["license"] == PROJECT["license"]
    assert citation["references"][0]["url"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_extra_that_a_message_names_exists() -> None:
    """And make installs extras that exist: pip only warns of others."""
    extras = PROJECT["optional-dependencies"]
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    named = {extra for text in code for extra in re.findall(r"(?:require|without_extra)\([^,()]+, \"(\w+)\"", text)}
    assert {"lab", "hf", "data"} <= named <= set(extras)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = re.findall(r"^EXTRAS_\w+ := (\S+)", makefile, re.MULTILINE)
    assert installed and {extra for given in installed for extra in given.split(",")} <= set(extras)

"""What the package says of itself is what it is; `make wheel` builds, checks and tries it."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deepdelta

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == deepdelta.__version__ and citation["license"] == PROJECT["license"]
    assert citation["references"][0]["url"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_make_commands_install_exact_versions() -> None:
    """Whatever the packages of the extras need in turn, as far as it is installed here."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([one.operator for one in pin.specifier] == ["=="] for pin in pins)
    pinned = {canonicalize_name(pin.name) for pin in pins}
    left, seen = [("deep-delta-learning", extra) for extra in ("lab", "test")], set[tuple[str, str]]()
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or installed apart
        for requirement in map(Requirement, needed):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(requirement.name), inner) for inner in ("", *requirement.extras)]
    found = {name for name, _ in seen} - {"deep-delta-learning"}
    assert len(found) > 60 and found <= pinned, found - pinned


def test_every_extra_that_a_message_names_exists() -> None:
    """And make installs extras that exist: pip only warns of others."""
    extras = PROJECT["optional-dependencies"]
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    named = {extra for text in code for extra in re.findall(r"(?:require|without_extra)\([^,()]+, \"(\w+)\"", text)}
    assert {"lab", "hf", "data"} <= named <= set(extras)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = re.findall(r"^EXTRAS_\w+ := (\S+)", makefile, re.MULTILINE)
    assert installed and {extra for given in installed for extra in given.split(",")} <= set(extras)

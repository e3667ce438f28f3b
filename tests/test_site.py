"""The site of `make docs`: every page has a place, every named table exists, every public name has a reference."""

import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import deepdelta

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "docs").glob("**/*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")
TWO = "# A\n\ntext\n\n| a |\n| --- |\n| 1 |\n\n## The second, too\n\n| b |\n| --- |\n| 2 |\n"


def test_every_page_stands_in_the_navigation_once() -> None:
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2], re.M)
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").glob("**/*.md")]
    assert sorted(named) == sorted([*pages, *hooks.PAGES.values(), "results/README.md"])


def test_pictures_are_few_and_small_and_the_moving_one_is_as_it_is_made() -> None:
    images = list((ROOT / "docs" / "images").iterdir())
    assert len(images) <= 12 and sum(image.stat().st_size for image in images) <= 2_000_000
    assert load("animation").picture() == (ROOT / "docs" / "images" / "operator.svg").read_text(encoding="utf-8")


def test_a_table_is_found_by_its_heading() -> None:
    assert hooks.table(TWO) == "| a |\n| --- |\n| 1 |"
    assert hooks.table(TWO, "the-second-too") == "| b |\n| --- |\n| 2 |"
    with pytest.raises(ValueError, match="no heading #third"):
        hooks.table(TWO, "third")


def test_a_comment_becomes_the_table_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "two.md").write_text(TWO, encoding="utf-8")
    found = hooks.included("before\n\n<!-- table two.md#the-second-too -->\n\nafter <!-- note -->\n", tmp_path)
    assert found == "before\n\n| b |\n| --- |\n| 2 |\n\nafter <!-- note -->\n"


def test_links_are_moved_to_where_the_site_has_their_pages() -> None:
    moved = "[a](../results/x/table.md#b) [c](../README.md) [d](parts/e.md) [f](#g) [h](https://arxiv.org/abs/1)"
    assert hooks.linked(moved, "docs/findings.md", "findings.md") == (
        "[a](results/x/table.md#b) [c](index.md) [d](parts/e.md) [f](#g) [h](https://arxiv.org/abs/1)"
    )
    assert hooks.linked("![p](results/x/plot.svg)", "README.md", "index.md") == "![p](results/x/plot.svg)"
    assert hooks.linked("[m](../method.md)", "docs/parts/gate.md", "parts/gate.md") == "[m](../method.md)"
    assert hooks.linked("```\n[m](../a.py)\n```\n", "docs/a.md", "a.md") == "```\n[m](../a.py)\n```\n"
    with pytest.raises(ValueError, match=r"docs/a.md: \.\./src/b.py is no part of the site"):
        hooks.linked("[b](../src/b.py)", "docs/a.md", "a.md")


@pytest.mark.parametrize("page", SOURCES, ids=name_of)
def test_a_page_s_tables_exist_and_their_files_are_linked(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, _ in hooks.MARK.findall(text):
        assert f"]({path}" in text, f"GitHub shows no table: {name_of(page)} has to link {path}"
    assert "\n<!-- table" not in hooks.included(text, page.parent)
    hooks.linked(text, name_of(page), name_of(page).removeprefix("docs/"))


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.M)
    for name in named:
        assert pkgutil.resolve_name(name).__doc__, name
    public = {f"deepdelta.{one}" for one in deepdelta.__all__} - {"deepdelta.__version__", "deepdelta.PRESETS"}
    assert public - set(named) == {"deepdelta.interop", "deepdelta.ops"}


def test_the_prose_of_the_results_is_short() -> None:
    pages = ("findings", "sizes", "attribution", "beyond-text", "weak-baseline")
    text = "\n".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in pages)
    assert (
        len([word for line in text.splitlines() if not line.startswith(("|", "<!--")) for word in line.split()]) < 4000
    )

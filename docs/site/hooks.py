"""What the site has beyond docs/: the pages of the root, the results, and the tables that pages name in comments.

On a page, `<!-- table ../results/quick/table.md -->` stands for the first table of that file; with `#heading` after the
name it stands for the table below that heading. On GitHub the comment is invisible and the link beside it serves.
"""

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^<!-- table (\S+?)(?:#(\S+))? -->$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
BLOCK = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def table(text: str, heading: str | None = None) -> str:
    """The first table of a page's text, or of its part below the heading with that anchor."""
    if heading:
        starts = [m.end() for m in re.finditer(r"^#+ (.+)$", text, re.MULTILINE) if anchor(m[1]) == heading]
        if not starts:
            raise ValueError(f"no heading #{heading}")
        text = text[starts[0] :]
    found = re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    if not found:
        raise ValueError("no table")
    return found[0].strip()


def included(markdown: str, folder: Path) -> str:
    """The page with every table that it names, its files named from `folder`."""
    return MARK.sub(lambda mark: table((folder / mark[1]).read_text(encoding="utf-8"), mark[2]), markdown)


def address(path: str) -> str | None:
    """Where a file of the repository stands in the site's sources; None where it does not."""
    if path in PAGES or path.startswith("results/"):
        return PAGES.get(path, path)
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def linked(markdown: str, path: str, source: str) -> str:
    """The page at `path` of the repository, with its links as they must be at `source` of the site."""

    def moved(match: re.Match[str]) -> str:
        if "://" in match[1]:
            return match[0]
        target = address(posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1])))
        if target is None:
            raise ValueError(f"{path}: {match[1]} is no part of the site")
        return posixpath.relpath(target, posixpath.dirname(source) or ".") + (match[2] or "")

    pieces = BLOCK.split(markdown)
    return "".join(one if one.startswith("```") else LINK.sub(moved, one) for one in pieces)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    from mkdocs.structure.files import File

    from deepdelta.explorer import operator_page

    results = sorted(str(one.relative_to(ROOT)) for one in (ROOT / "results").glob("**/*") if one.is_file())
    wanted = [one for one in results if one.endswith((".md", ".svg", "results.json", "audit.json", "scaling.json"))]
    for path in [*PAGES, *wanted]:
        files.append(File.generated(config, PAGES.get(path, path), abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "operator.html", content=operator_page()))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    assert page.file.abs_src_path
    file = Path(page.file.abs_src_path)
    return linked(included(markdown, file.parent), str(file.relative_to(ROOT)), page.file.src_uri)

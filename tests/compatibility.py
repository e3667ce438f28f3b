"""The table of docs/ecosystem.md, made of the tests that are marked `compatible`: what works, with what, which test.

python tests/compatibility.py writes it there.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE = ROOT / "docs" / "ecosystem.md"
HEADING = "## Compatibility\n"
HEAD = "| what | with | test | target |\n| --- | --- | --- | --- |\n"
PINNED = {"hf4": ROOT / "constraints-hf4.txt"}
"""Where the versions of a target stand that has its own."""


def versions(target: str) -> dict[str, str]:
    text = PINNED.get(target, ROOT / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.M))


def marks(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """The marks of pytest in a decorator or a `pytestmark`, with their arguments that are text."""
    calls = {id(one.func): one.args for one in ast.walk(node) if isinstance(one, ast.Call)}
    for mark in ast.walk(node):
        if isinstance(mark, ast.Attribute) and isinstance(mark.value, ast.Attribute) and mark.value.attr == "mark":
            yield mark.attr, [one.value for one in calls.get(id(mark), ()) if isinstance(one, ast.Constant)]


def rows() -> Iterator[str]:
    for file in sorted(TESTS.glob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "mark.compatible(" not in text:
            continue
        tree = ast.parse(text)
        shared = [
            name
            for node in tree.body
            if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == ["pytestmark"]
            for name, _ in marks(node)
        ]
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            own = [mark for decorator in node.decorator_list for mark in marks(decorator)]
            named = [*shared, *(name for name, _ in own)]
            target = next((name for name in ("home", "hf", "hf4") if name in named), None)
            pinned = versions(target or "")
            for what, *packages in (arguments for name, arguments in own if name == "compatible"):
                held = ", ".join(f"{package} {pinned[package.lower()]}" for package in packages)
                where = f"`make test{f'-{target}' if target else ''}`".replace("hf4", "hf-4")
                yield f"| {what} | {held} | `tests/{file.name}::{node.name}` | {where} |\n"


def table() -> str:
    return HEAD + "".join(sorted(set(rows())))


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, after = text.partition(HEAD)
    rest = re.sub(r"\A(?:\|.*\n)*", "", after)
    PAGE.write_text(before + table() + rest, encoding="utf-8")

"""The order of folders: every import points down a list, in which only the commands stand above the laboratory."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deepdelta

SOURCE = Path(deepdelta.__file__).parent
ORDER = """
releases version
errors
config files ids device progress provenance interruption notebook
limits
tensors
ops
operator
nn
models
decoding
data interop
training
retrofitting selfcheck planning harness
explorer hf
exporting
lab.measure lab.layers
lab.analysis
lab.audit
lab.experiments
lab.views
lab.tasks lab.bench lab.watching
lab.runner lab.preview
cli
__main__
"""
"""A line imports from the lines above it and from itself; what stands on one line does not import each other."""
HEIGHT = {name: height for height, line in enumerate(ORDER.split("\n")) for name in line.split()}


def place(name: str) -> str:
    """The entry of ORDER that a module, named below deepdelta, belongs to."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "lab" else 1])


def module(file: Path) -> str:
    """Its name below deepdelta."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def is_module(name: str) -> bool:
    path = SOURCE / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def imported(tree: ast.Module) -> set[str]:
    """Modules below deepdelta that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"deepdelta\b", node.module or ""):
            assert node.module is not None
            base = node.module.removeprefix("deepdelta").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix(".")
                found.add(name if is_module(name) else base)
        elif isinstance(node, ast.Import):
            found |= {name.removeprefix("deepdelta.") for a in node.names if (name := a.name).startswith("deepdelta.")}
    return found - {""}


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_import_points_down(file: Path) -> None:
    own = place(module(file))
    if own == "lab":
        return
    for name in imported(ast.parse(file.read_text(encoding="utf-8"))):
        other = place(name)
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{own} must not import {name}"


@pytest.mark.parametrize("file", sorted((SOURCE / "lab/views").glob("*.py")), ids=lambda file: file.name)
def test_views_read_what_the_analysis_found_and_compute_none_of_it(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and re.match(
            r"deepdelta\.lab\.(analysis|audit|experiments)", node.module or ""
        ):
            found = [getattr(importlib.import_module(node.module or ""), alias.name) for alias in node.names]
            assert not any(map(inspect.isroutine, found)), f"{node.module}: {[alias.name for alias in node.names]}"


@pytest.mark.parametrize("file", sorted((SOURCE / "lab").rglob("results.py")), ids=lambda file: file.parent.name)
def test_results_know_no_views(file: Path) -> None:
    known = imported(ast.parse(file.read_text(encoding="utf-8")))
    assert not [name for name in known if re.search(r"\.(views|tables|figures)\b", name)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_fused_code_is_reached_by_the_interfaces_of_ops_alone(file: Path) -> None:
    """And by these within functions: numba and Triton are extras."""
    name, tree = module(file), ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if not name.startswith("ops.backends"):
        assert not any(other.startswith("ops.backends") for other in imported(tree))
    elif not name.startswith("ops.backends.cuda"):
        assert not any(other.startswith("ops.backends.cuda") for other in imported(tree))
    if not name.startswith("ops."):
        assert "ops.backends" not in file.read_text(encoding="utf-8")


def test_the_list_is_that_of_the_package() -> None:
    names = {place(module(file)) for file in FILES}
    assert names - {"lab"} == set(HEIGHT)
    # The library does not know the laboratory: whatever stands below it in the list.
    assert max(height for name, height in HEIGHT.items() if not re.match("lab|cli|__main__", name)) < min(
        height for name, height in HEIGHT.items() if name.startswith("lab")
    )


SLOW = "torch._dynamo torch._inductor sympy numba llvmlite triton scipy plotly matplotlib transformers torchvision"
"""What takes long to import and a first call does not need."""
FUSED = """
import torch, deepdelta
stream = deepdelta.DeltaStream(4, 2, seed=0)
residual = stream.wrap(torch.nn.Linear(4, 4))
deepdelta.use_backend(residual, "fused")
residual(stream.expand(torch.ones(1, 4))).sum().backward()
"""


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import deepdelta", f"{SLOW} deepdelta.lab tyro"),
        ("from deepdelta.cli import main; main(['--help'])", f"{SLOW} deepdelta.lab"),
        (FUSED, "torch._dynamo torch._inductor sympy triton"),
    ],
    ids=["package", "help", "fused"],
)
def test_what_a_first_call_does_not_import(code: str, names: str) -> None:
    tell = f"print('found:', [name for name in {names.split()} if name in sys.modules])"
    told = f"import atexit, sys; atexit.register(lambda: {tell})"
    done = subprocess.run([sys.executable, "-c", f"{told}\n{code}"], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("found: []")

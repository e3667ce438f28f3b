"""What every test runs under: one thread, no deadlines, a cache folder of its own, garbage collected of what is new."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

_CACHE = tempfile.TemporaryDirectory(prefix="deepdelta-tests-")
os.environ["DEEPDELTA_CACHE"] = _CACHE.name  # before any import reads it; subprocesses inherit it
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses: threads that wait for each other on shared cores only spin

# A garbage collection walks over all that is alive, and of some 600,000 objects that are once every test file is
# imported most are for good: a fifth of the time of numba's compiler. None while they are imported; then of new ones.
gc.disable()

torch.set_num_threads(1)
settings.register_profile(
    "deepdelta",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deepdelta")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that make something for all of their tests come first: a worker that has nothing left to do takes the last
    tests of another, and would make it again for half of a file."""

    def made(item: pytest.Item) -> bool:
        known = getattr(item, "_fixtureinfo").name2fixturedefs.items()  # noqa: B009
        return any(definitions[-1].scope == "module" for name, definitions in known if name != "unchecked_file")

    files = {item.path for item in items if made(item)}
    items.sort(key=lambda item: item.path not in files)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


@contextmanager
def _without_type_checks() -> Iterator[None]:
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "deepdelta"]
    classes = {value for module in modules for value in vars(module).values() if _is_class_of_the_package(value)}
    before = jaxtyping.config.jaxtyping_disable
    with pytest.MonkeyPatch.context() as monkeypatch:
        for owner in (*modules, *classes):
            for name, value in list(vars(owner).items()):
                if getattr(getattr(value, "__code__", None), "co_filename", None) == jaxtyping._decorator.__file__:
                    monkeypatch.setattr(owner, name, value.__wrapped__)
        jaxtyping.config.update("jaxtyping_disable", True)
        yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The package as users have it, without the run-time type checks of the test run: these would answer a wrong shape
    before the package's own message does, and torch.compile cannot trace them."""
    with _without_type_checks():
        yield


@pytest.fixture(scope="module")
def unchecked_file() -> Iterator[None]:
    """The same for a file of tests that repeat, many times over, what other files do under these checks: they take half
    of the time."""
    with _without_type_checks():
        yield


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("Chromium is absent: sudo apt-get install -y chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def gate_dtypes(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The dtypes of the numbers that linear gates and targets were made of in the test so far."""
    from deepdelta.nn import residual  # not above: the type checks are put in place when it is first imported

    made, seen = residual.precise_linear, set()

    def numbers(*args: Any) -> torch.Tensor:
        result = made(*args)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(residual, "precise_linear", numbers)
    return seen


def _is_class_of_the_package(value: object) -> bool:
    return isinstance(value, type) and value.__module__.partition(".")[0] == "deepdelta"

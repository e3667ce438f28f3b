"""What every test runs under: one thread, no deadlines, a cache folder of its own."""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config as jaxtyping_config

_CACHE = tempfile.TemporaryDirectory(prefix="deepdelta-tests-")
os.environ["DEEPDELTA_CACHE"] = _CACHE.name  # before any import reads it; subprocesses inherit it

torch.set_num_threads(1)
settings.register_profile(
    "deepdelta",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deepdelta")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Runs the package as users do, without the run-time type checks of the test run: these would answer a wrong
    shape before the package's own message does, and torch.compile cannot trace them."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)

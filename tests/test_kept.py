"""What numba keeps on disk: no place for it, a place that others can write, files that were cut short."""

import os
import re
import threading
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core import caching

from deepdelta import GPT, PRESETS, GPTConfig, UserError, use_backend
from deepdelta.nn.backend import known_problem
from deepdelta.nn.runtime import backend_taken
from deepdelta.ops.backends.cpu import kernels
from deepdelta.ops.backends.cpu.records import Kernel
from deepdelta.ops.backends.cpu.team import compiled, loop, run
from deepdelta.ops.step import Normalise, fused_problem
from deepdelta.ops.step.arguments import Replayed
from deepdelta.ops.step.decoding import DecodingStep


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place that numba has."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    return tmp_path / "kept"


def usable() -> None:
    assert fused_problem(torch.device("cpu"), torch.float32) is None
    both_right()


def refused(message: str) -> None:
    """By name where fused code is asked for; `auto` takes the reference and says the same."""
    model = GPT(GPTConfig(vocab_size=11, dim=8, heads=2, layers=1, context=8, residual=PRESETS["paper-cc"]))
    with pytest.raises(UserError, match=f"{message}.*set NUMBA_CACHE_DIR to .*; or use the backend 'reference'"):
        use_backend(model, "fused")
    known_problem.cache_clear()
    use_backend(model, "auto")
    with pytest.warns(RuntimeWarning, match=f"{message}.*until then the backend 'auto' takes plain PyTorch"):
        chosen = backend_taken(model, 1 << 20)
    assert chosen.backend == "reference" and "NUMBA_CACHE_DIR" in chosen.reason
    assert model(torch.zeros(1, 2, dtype=torch.long)).logits.isfinite().all()
    known_problem.cache_clear()
    with pytest.raises(UserError, match=message):
        written()


def written() -> tuple[Any, Any]:
    """A loop, and a function that is kept by itself; both double a number."""

    def share(at):
        at[1] = 2 * at[0]

    def double(x):
        return 2 * x

    return loop(share), compiled(double, kept=True)


def both_right() -> Any:
    made, double = written()
    table = np.array([21, 0])
    run(made, table.ctypes.data, 1)
    assert table.tolist() == [21, 42]
    assert double(21) == 42
    return double.stats


def test_no_place(folder: Path) -> None:
    usable()
    folder.parent.joinpath("kept").rename(folder.parent / "moved")
    folder.write_text("a file where the folder was to be")
    refused("numba finds no folder that it can write")


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757, pytest.param(0o770, marks=as_root)], ids=oct)
def test_a_place_that_others_can_write(folder: Path, mode: int) -> None:
    usable()
    for inner in folder.iterdir():
        if mode == 0o770:
            os.chown(inner, -1, os.getuid() + 1)  # a group of other people
        inner.chmod(mode)
    refused("can be written by others")


def test_a_place_that_is_new_is_its_owner_s_alone(folder: Path) -> None:
    """Whatever others may read by the umask; one that was there keeps its mode."""
    before = os.umask(0o022)
    try:
        usable()
    finally:
        os.umask(before)
    kept = [inner for inner in folder.iterdir() if inner.is_dir()]
    assert kept and {oct(inner.stat().st_mode & 0o777) for inner in kept} == {"0o700"}
    for inner in kept:
        inner.chmod(0o755)
        (inner / "index").touch()
    usable()
    assert {oct(inner.stat().st_mode & 0o777) for inner in kept} == {"0o755"}


def test_a_place_within_one_that_others_can_write(folder: Path) -> None:
    usable()
    folder.chmod(0o777)
    refused("can be written by others")
    folder.chmod(0o1777)  # nobody removes or renames what is another's
    usable()
    for inner in folder.iterdir():
        inner.chmod(0o775)  # the group of the same number as the user
    usable()


@as_root
def test_a_place_that_belongs_to_another(folder: Path) -> None:
    usable()
    for inner in folder.iterdir():
        os.chown(inner, 54321, -1)
    refused("belongs to another user")


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("size", [0, 100])
def test_files_that_were_cut_short_are_made_anew(folder: Path, suffix: str, size: int) -> None:
    both_right()
    whole = {path: path.stat().st_size for path in folder.rglob(f"*.{suffix}")}
    assert len(whole) >= 2 and min(whole.values()) > 100
    for path in whole:
        with path.open("r+b") as file:
            file.truncate(size)
    both_right()
    assert min(path.stat().st_size for path in whole) > 100
    assert sum(both_right().cache_hits.values()) == 1  # kept again


class AtOnce(threading.Timer):
    """A timer whose time has come when it is started."""

    def start(self) -> None:
        self.function()


class Never(threading.Timer):
    def start(self) -> None: ...


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("timer", [AtOnce, Never])
def test_long_compilation_is_said_once_on_stderr(
    timer: type[threading.Timer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "Timer", timer)

    ones, made = torch.ones(1, 1, 2), torch.empty(1, 1, 2)
    double = Kernel(kernels.replay, "N", Replayed)
    for _ in range(2):
        double(Replayed(state=ones, h=ones[:, 0], coefficient=ones[..., 0], new=made))
    assert made.tolist() == [[[2, 2]]]
    step = DecodingStep(
        *(1, 1, 2, torch.float32), maps=None, gating=None, normalise=Normalise(None, 0), compression=None,
        norm_weight=None, norm_eps=0.0, opens=False,
    )  # fmt: skip
    assert step(ones, ones[0], ones[0])[0].tolist() == [[[2, 2]]]
    out, err = capsys.readouterr()
    assert out == ""
    if timer is Never:
        assert err == ""
        return
    for line, what in zip(err.splitlines(), ["the loop 'replay'"] * 2 + ["the decoding of a token"] * 2, strict=True):
        assert re.fullmatch(
            rf"compil(ing|ed) {what} (for this machine, once: later processes load it|in [0-9.]+ s)", line
        )

"""Compiled loops: their arguments by name, and what another process takes of them from disk or compiles anew."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from deepdelta.ops.backends.cpu import kernels, launch, records, team
from deepdelta.ops.backends.cpu.records import Kernel
from deepdelta.ops.backends.cpu.team import compiled, loop, part, run
from deepdelta.ops.step.arguments import Replayed


class Filled(NamedTuple):
    """What `fill` below takes, in another order, and more than that."""

    scale: float
    y: Annotated[Tensor | None, "wide N D"]
    other: Annotated[Tensor | None, "stored D"]
    count: int
    x: Annotated[Tensor, "stored N D"]
    parts: Annotated[Tensor, "wide * D"]
    bits: float | None


@compiled
def fill(first, last, one, x, parts, count, y, scale, bits):
    for n in range(first, last):
        for d in range(x.shape[1]):
            parts[d] += x[n, d]
            if y is not None:
                y[n, d] = x[n, d] * scale + count * one
            if bits is not None:
                parts[d] += bits


def filled(**changes: Any) -> Filled:
    x = torch.arange(6.0).reshape(3, 2)
    given = Filled(scale=0.1, y=x.new_zeros(3, 2), other=None, count=2, x=x, parts=x.new_zeros(1, 2), bits=None)
    return given._replace(**changes)


def test_arguments_come_by_name_whatever_their_order() -> None:
    kernel, given = Kernel(fill, "N", Filled), filled()
    kernel(given)
    assert given.y is not None
    torch.testing.assert_close(given.y, given.x * 0.1 + 2, rtol=0, atol=0)
    torch.testing.assert_close(given.parts, given.x.sum(0, keepdim=True))
    other = filled(y=None, bits=0.5, x=given.x.double(), parts=given.parts.double() * 0)
    kernel(other)
    torch.testing.assert_close(other.parts, other.x.sum(0, keepdim=True) + 1.5)


def test_every_thread_gets_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    if team._openmp() is None:
        pytest.skip("this torch has no OpenMP library that can be called")
    monkeypatch.setattr(records, "threads", lambda: 3)
    monkeypatch.setattr(records, "SHARE", 1)
    given = filled(parts=torch.zeros(3, 2))
    Kernel(fill, "N", Filled)(given)
    torch.testing.assert_close(given.parts, given.x)


def test_a_thread_more_only_where_there_is_work_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "threads", lambda: 3)
    share = records.SHARE
    assert [records.team_of(8, numbers) for numbers in (1, 2 * share - 1, 2 * share, 9 * share)] == [1, 1, 2, 3]
    assert records.team_of(2, 9 * share) == 2 and records.team_of(0, 0) == 1


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "x must be .* got none"),
        ({"x": X.double()}, r"parts must be torch.float64 \(1, 2\).*got torch.float32"),
        ({"y": X[:2]}, r"y must be torch.float32 \(3, 2\).*got torch.float32 \(2, 2\)"),
        ({"y": X.half()}, "y must be torch.float32 .*got torch.float16"),
        ({"y": X.T.contiguous().T}, "y must be .*contiguous"),
        ({"parts": torch.zeros(2, 2)}, r"parts must be torch.float32 \(1, 2\)"),
        ({"x": X.to("meta")}, "x must be .*on the CPU"),
    ],
    ids=str,
)
def test_a_tensor_that_is_not_as_declared_is_refused(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(TypeError, match=message):
        Kernel(fill, "N", Filled)(filled(**changes))


def test_a_wrong_or_missing_name_is_refused_before_an_address_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(TypeError, match="one record each of Replayed, but parts, count, y, scale, bits, x are not"):
        Kernel(compiled(lambda first, last, one, parts, count, y, scale, bits, x: None), "N", Replayed)
    with pytest.raises(TypeError, match="one record each of Filled, Filled, but x"):
        Kernel(fill, "N", Filled, Filled)
    with pytest.raises(TypeError, match=r"fill takes .*Filled.*got .*Replayed"):
        Kernel(fill, "N", Filled)(Replayed(X, X, X, X))
    with pytest.raises(TypeError, match="hh"):
        launch.replay(Replayed(state=X, hh=X, coefficient=X, new=X))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'new'"):
        launch.replay(Replayed(state=X, h=X, coefficient=X))  # type: ignore[call-arg]


def writing(number: int, module: ModuleType) -> Any:
    """A loop that writes a number, and would call what is in a module."""

    def share(at):
        at[0] = number + part(1)[0]

    return loop(share, module)


def written(made: Any) -> int:
    table = np.zeros(1, np.int64)
    run(made, table.ctypes.data, 1)
    return int(table[0])


def test_a_loop_is_compiled_once_for_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "called.py"

    def imported(text: str) -> ModuleType:
        source.write_text(text)
        module = ModuleType("called")
        module.__file__ = str(source)
        return module

    first = imported("first")
    made = writing(3, first)
    assert made.cache_hits == 0 and written(made) == 3
    assert writing(3, first).cache_hits == 1
    other = writing(4, first)
    assert other.cache_hits == 0 and written(other) == 4
    assert writing(3, imported("other")).cache_hits == 0
    # What runs is what was imported, whatever stands in the file by now.
    assert writing(3, first).cache_hits == 1
    again = [writing(number, imported("first")) for number in (3, 4)]
    assert [one.cache_hits for one in again] == [1, 1] and list(map(written, again)) == [3, 4]
    # An index for each, so that processes which save at the same time do not number each other's files.
    assert len(list(tmp_path.rglob("*.nbi"))) == len(list(tmp_path.rglob("*.nbc"))) == 3


def test_another_process_does_not_compile_again(tmp_path: Path) -> None:
    script = """
import torch
from deepdelta.ops.backends.cpu.launch import replay
from deepdelta.ops.step.arguments import Replayed
x = torch.zeros(2, 1, 3)
replay(Replayed(state=x, h=x[:, 0], coefficient=x[..., 0].contiguous(), new=x))
print(*(made.cache_hits for made in replay._loops.values()))
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert [one.split() for one in said] == [["0"], ["1"]]


def test_what_loops_call_is_kept_with_them_alone() -> None:
    """By itself numba would keep a kernel by its own file, and not see a change of `load` or `store`."""
    for kernel in (kernels.forward, kernels.backward, kernels.replay):
        assert kernel._cache.cache_path is None
    assert kernels.decode._cache.cache_path is not None

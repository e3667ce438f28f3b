"""Compiled loops on disk: what another process takes from there, and what makes it compile anew."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest
import torch

from deepdelta.ops.step import cpu_kernel
from deepdelta.ops.team import Loop, address, array_at, loop, part, run


def writing(number: int, module: ModuleType) -> Loop:
    """A loop that writes a number, and would call what is in a module."""

    def make(team: int | None) -> object:
        def share(at):
            index, _ = part(team)
            array_at(at[0], (1,), np.int64)[0] = number + index

        return share

    return loop(make, module)


def written(made: Loop) -> int:
    found = torch.zeros(1, dtype=torch.int64)
    run(made, [address(found)], 1)
    return int(found)


def hits(made: Loop) -> set[int]:
    return {one.cache_hits for one in made if one is not None}


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
    assert hits(made) == {0} and written(made) == 3
    assert hits(writing(3, first)) == {1}
    other = writing(4, first)
    assert hits(other) == {0} and written(other) == 4
    assert hits(writing(3, imported("other"))) == {0}
    # What runs is what was imported, whatever stands in the file by now.
    assert hits(writing(3, first)) == {1}
    again = [writing(number, imported("first")) for number in (3, 4)]
    assert [hits(one) for one in again] == [{1}, {1}] and list(map(written, again)) == [3, 4]
    # An index for each, so that processes which save at the same time do not number each other's files.
    kinds = sum(one is not None for one in made)
    assert len(list(tmp_path.rglob("*.nbi"))) == len(list(tmp_path.rglob("*.nbc"))) == 3 * kinds


def test_another_process_does_not_compile_again(tmp_path: Path) -> None:
    script = """
import numpy as np
from deepdelta.ops.step import cpu
print(*(made.cache_hits for made in cpu._replay(np.float32, np.float32) if made is not None))
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert [set(one.split()) for one in said] == [{"0"}, {"1"}]


def test_what_loops_call_is_kept_with_them_alone() -> None:
    """By itself numba would keep a kernel by its own file, and not see a change of `load` or `store`."""
    for kernel in (cpu_kernel.forward, cpu_kernel.backward, cpu_kernel.replay):
        assert kernel._cache.cache_path is None
    assert cpu_kernel.decode._cache.cache_path is not None

"""The Triton kernels of the fused step without a GPU: in Triton's interpreter against fp64, and compiled for a GPU."""

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import interpreted_step
import triton_study
from step_cases import EDGES, SMALL_TILES, Case
from step_pairs import CASES, GATED

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., None]]:
    """Calls a function of interpreted_step in the process that has the interpreter."""
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning, initializer=interpreted_step.start) as pool:
        yield lambda function, *values: pool.submit(function, *values).result()


HALF = CASES[::2] + GATED + EDGES


@pytest.mark.parametrize("case", HALF + [pytest.param(case, marks=pytest.mark.scale) for case in CASES[1::2]], ids=str)
def test_values_and_all_gradients_in_fp64(interpreted, case):
    interpreted(interpreted_step.check, case, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[::4] + GATED[:2], ids=str)
def test_no_worse_than_plain_pytorch_in_low_precision(interpreted, case, dtype):
    interpreted(interpreted_step.check, case, dtype)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_compression_reads_the_state_as_it_was_stored(interpreted, dtype, tiled):
    interpreted(interpreted_step.check_rounding, Case(width=100, opening="open", tiled=tiled), dtype)


def test_the_same_results_every_time(interpreted):
    interpreted(interpreted_step.check_repeats, Case(tokens=11), torch.bfloat16)


def test_views_of_a_state(interpreted):
    interpreted(interpreted_step.check_views, Case())


def test_no_tokens(interpreted):
    interpreted(interpreted_step.check_nothing, Case())


def test_a_check_fails_where_a_result_is_wrong(interpreted):
    """The comparison above is worth something: another offset than the kernel's is found out."""
    with pytest.raises(AssertionError, match="allowed"):
        interpreted(interpreted_step.check_against, Case(), Case(offset=1.0))


def test_another_default_dtype_changes_nothing(interpreted):
    interpreted(interpreted_step.check_under_another_default, Case(made="both"))


@given(st.integers(1, 64), st.integers(1, 20000), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_blocks_fit_their_limits(channels, width, dtype):
    from deepdelta.ops.backends.cuda import tiles

    for kernel, whole in (("forward", tiles.WHOLE_FORWARD), ("backward", tiles.WHOLE_BACKWARD)):
        rows, columns, warps, programs = tiles.blocks(kernel, channels, width, dtype)
        assert rows >= channels and rows & (rows - 1) == columns & (columns - 1) == warps & (warps - 1) == 0
        assert rows * columns * (2 if dtype == torch.float64 else 1) <= whole
        assert 1 <= warps <= 16 and programs >= 1
        if columns < width:
            assert rows * columns * 2 > tiles.TILE // 2


def test_the_tiles_of_the_launch_are_those_of_the_study():
    """Whose file says what was compiled; and at the sizes of the paper nothing spills."""
    from deepdelta.ops.backends.cuda import tiles

    study = triton_study.load()
    assert tiles.MEASURED == triton_study.table(study.kernels)
    chosen = [one for one in study.kernels if one.chosen]
    sizes = {(one.channels, one.width) for one in chosen}
    assert sizes == set(itertools.product(triton_study.CHANNELS, triton_study.WIDTHS)) > set(triton_study.PUBLISHED)
    assert not any(one.spilled for one in chosen if (one.channels, one.width) in triton_study.PUBLISHED)


@pytest.fixture
def empty_triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("empty_triton_cache")
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_a_whole_token_is_loaded_once(kernel):
    """Compiled for Hopper at V = 4, D = 768, bf16: every input is loaded once, and only tokens are looped over."""
    code = compiled_for_gpu(kernel, Case(channels=4, width=768, made="both"), torch.bfloat16).asm["ttir"]
    assert code.count("tt.load ") == {"forward": 6, "backward": 14}[kernel]
    assert code.count("scf.for ") == {"forward": 0, "backward": 1}[kernel]


COMPILED = list(zip(CASES + GATED, itertools.cycle([torch.float64, *DTYPES]), strict=False))[::5]


@pytest.mark.usefixtures("empty_triton_cache")
@pytest.mark.parametrize(
    ("case", "dtype"),
    # One of each list: a case takes some eight seconds.
    COMPILED[::6] + [pytest.param(*one, marks=pytest.mark.scale) for one in COMPILED if one not in COMPILED[::6]],
    ids=str,
)
def test_what_runs_in_the_interpreter_compiles_for_a_gpu(case, dtype):
    for kernel in ("forward", "backward", "replay"):
        assert len(compiled_for_gpu(kernel, case, dtype).asm["cubin"]) > 0


def compiled_for_gpu(kernel: str, case: Case, dtype: torch.dtype) -> Any:
    """The kernel as ops/backends/cuda has it compiled for this case."""
    from deepdelta.ops.backends.cuda import tiles

    with patch.multiple(tiles, **(SMALL_TILES if case.tiled else {"TILE": tiles.TILE})):
        tile = tiles.blocks(kernel, case.channels, case.width, dtype)
    return triton_study.compile_for_gpu(kernel, case, dtype, tile)

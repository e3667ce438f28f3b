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
from deepdelta.ops.precision import accumulation_dtype
from step_cases import CASES, EDGES, EPS, GATED, SMALL_TILES, Case, inputs

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., None]]:
    """Calls a function of interpreted_step in the process that has the interpreter."""
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning, initializer=interpreted_step.start) as pool:
        yield lambda function, *values: pool.submit(function, *values).result()


@pytest.mark.parametrize("case", CASES + GATED + EDGES, ids=str)
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


@given(st.integers(1, 64), st.integers(1, 20000), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_blocks_fit_their_limits(channels, width, dtype):
    from deepdelta.ops.backends.cuda import launch

    for whole in (launch.WHOLE_FORWARD, launch.WHOLE_BACKWARD):
        rows, columns, warps = launch.blocks(channels, width, dtype, whole)
        assert rows >= channels and rows & (rows - 1) == columns & (columns - 1) == warps & (warps - 1) == 0
        assert rows * columns * (2 if dtype == torch.float64 else 1) <= whole
        assert 1 <= warps <= 16
        if columns < width:
            assert rows * columns * 2 > launch.TILE // 2


@pytest.fixture
def empty_triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("empty_triton_cache")
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_a_whole_token_is_loaded_once(kernel):
    """Compiled for Hopper at V = 4, D = 768, bf16: every input is loaded once, and only tokens are looped over."""
    code = compiled_for_gpu(kernel, Case(channels=4, width=768), torch.bfloat16).asm["ttir"]
    assert code.count("tt.load ") == {"forward": 6, "backward": 12}[kernel]
    assert code.count("scf.for ") == {"forward": 0, "backward": 1}[kernel]


@pytest.mark.usefixtures("empty_triton_cache")
@pytest.mark.parametrize(
    ("case", "dtype"), list(zip(CASES, itertools.cycle([torch.float64, *DTYPES]), strict=False))[::3], ids=str
)
def test_what_runs_in_the_interpreter_compiles_for_a_gpu(case, dtype):
    for kernel in ("forward", "backward", "replay"):
        assert len(compiled_for_gpu(kernel, case, dtype).asm["cubin"]) > 0


def compiled_for_gpu(kernel: str, case: Case, dtype: torch.dtype) -> Any:
    """The kernel as ops/backends/cuda has it compiled for this case; no GPU is needed to compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deepdelta.ops.backends.cuda import kernels, launch

    function = getattr(kernels, kernel)
    with patch.multiple(launch, **(SMALL_TILES if case.tiled else {"TILE": launch.TILE})):
        whole = launch.WHOLE_BACKWARD if kernel == "backward" else launch.WHOLE_FORWARD
        tile = launch.blocks(case.channels, case.width, dtype, whole)
    parts = inputs(case)
    gates = parts["erase"].shape[1] if "erase" in parts else 0
    missing = {"erase", "compression", "norm_weight"} - parts.keys() | ({"c"} if not case.opens else set())
    missing |= {"read"} if "erase" in missing else set()
    constants = {
        **{prefix + name: None for name in missing for prefix in ("", "d_")},
        **{"OFFSET": case.offset, "POWER": case.power, "EPS": EPS, "V": case.channels},
        **{"D": case.width, "GATES": gates, "BLOCK_V": tile.channels, "BLOCK_D": tile.width},
    }
    narrow, wide = (f"*fp{dtype.itemsize * 8}", f"*fp{accumulation_dtype(dtype).itemsize * 8}")
    kinds = dict.fromkeys(("state", "h", "new", "c", "d_new", "d_c", "d_state", "d_h"), narrow) | {"tokens": "i64"}
    if dtype == torch.bfloat16:
        kinds = {name: kind.replace("fp16", "bf16") for name, kind in kinds.items()}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, wide) for name in names}
    source = ASTSource(
        function,
        signature,
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps})

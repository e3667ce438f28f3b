"""The kernels of the fused step in Triton's interpreter: what the worker process of test_step_triton runs.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own. Tensors that a function
leaves unwritten are NaN there.
"""

import os
from collections.abc import Mapping
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from step_cases import SMALL_TILES, Case, compare, differentiated, fused_and_replayed, in_dtype, inputs


def start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    assert torch.empty_like(torch.ones(3)).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    from triton.runtime import interpreter

    converted = interpreter._convert_float

    def rounded(data: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        """To the nearest bf16, as a GPU does; the interpreter cuts the low bits off."""
        if (str(source), str(target)) != ("fp32", "bf16"):
            return converted(data, source, target, mode)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded


def results(case: Case, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """X', c' and all gradients from the kernels; X' is replayed on the way and must be the same to the bit."""
    from deepdelta.ops.backends.cuda import launch, tiles
    from deepdelta.ops.step import interface

    # Two programs, one after another, so that each has a run of several tokens.
    small = patch.multiple(tiles, RESIDENT_WARPS=2, **(SMALL_TILES if case.tiled else {}))
    with small, patch.object(interface, "_implementation", lambda state: launch):
        return differentiated(fused_and_replayed, case, given)


def check(case: Case, dtype: torch.dtype) -> None:
    compare(case, results(case, in_dtype(inputs(case), dtype)), dtype)


def check_under_another_default(case: Case) -> None:
    """torch.set_default_dtype changes nothing."""
    given = in_dtype(inputs(case), torch.float32)
    before = results(case, given)
    torch.set_default_dtype(torch.float64)
    try:
        after = results(case, given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def check_rounding(case: Case, dtype: torch.dtype) -> None:
    """c' is the compressed state as it was stored, rounded once."""
    given = inputs(case)
    found = results(case, in_dtype(given, dtype))
    exact = (found["new"].double() * given["compression"]).sum(-2)
    torch.testing.assert_close(found["c"].double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=1e-6)


def check_repeats(case: Case, dtype: torch.dtype) -> None:
    given = in_dtype(inputs(case), dtype)
    first, second = results(case, given), results(case, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_views(case: Case) -> None:
    """A state that is a transposed or an expanded view gives what its dense copy gives."""
    given = inputs(case)
    for state in (given["state"].mT.contiguous().mT, given["state"][:, :1].expand_as(given["state"])):
        dense, view = (results(case, {**given, "state": s}) for s in (state.contiguous(), state))
        assert all(torch.equal(dense[name], view[name]) for name in dense)


def check_nothing(case: Case) -> None:
    """No tokens: empty results, and gradients of the parameters that are zero."""
    found = results(case._replace(tokens=0), inputs(case._replace(tokens=0)))
    assert found["new"].shape == (0, case.channels, case.width)
    assert not found["gradient of compression"].any() and not found["gradient of norm_weight"].any()


def check_against(case: Case, other: Case) -> None:
    """The kernels' results for one case against the truth of another."""
    compare(other, results(case, in_dtype(inputs(case), torch.float64)), torch.float64)

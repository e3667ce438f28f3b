"""A token that is not finite stays alone: in the rewrite with channel compression it touches no other token.

Held bit for bit against the same batch with that token left as it was: outputs and the gradients of inputs. Gradients
of parameters are sums over tokens, and training skips a step in which they are not finite.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from deepdelta import DeltaStream, use_backend, use_memory
from deepdelta.nn import Backend, Plan
from helpers import randn
from step_cases import Case, differentiated, fused_and_replayed, in_dtype, inputs, reference

pytestmark = pytest.mark.usefixtures("unchecked_file")
BAD = 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# numba compiles each set of options and dtype anew: those that tests/test_step_cpu.py has too.
TRIED = [
    *((Case(), dtype) for dtype in DTYPES),
    (Case(gates="each", power=0, opening="open"), DTYPES[0]),
    (Case(gates="each", offset=None, power=0, opening="closed"), DTYPES[0]),
]
PER_TOKEN = {"new", "c", *(f"gradient of {name}" for name in ("state", "h", "write", "erase", "numbers"))}


def without(token: int, tensor: Tensor) -> Tensor:
    return torch.cat((tensor[:token], tensor[token + 1 :]))


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize(("case", "dtype"), TRIED, ids=str)
def test_one_step(case: Case, fused: bool, dtype: torch.dtype) -> None:
    """In the state, the branch's output or the coefficients; replayed states are compared where all are finite."""
    step = fused_step_alone if fused else reference
    given = in_dtype(inputs(case), dtype)
    clean = differentiated(step, case, given)
    for name in [name for name in given if f"gradient of {name}" in PER_TOKEN]:
        for value in (math.nan, math.inf, -math.inf):
            ill = given | {name: given[name].clone()}
            ill[name][BAD].flatten()[-1] = value
            found = differentiated(step, case, ill)
            assert not found["new"][BAD].isfinite().all(), (name, value)
            for output in PER_TOKEN & found.keys():
                kept = without(BAD, found[output])
                assert kept.isfinite().all() and kept.equal(without(BAD, clean[output])), (name, value, output)


def fused_step_alone(case: Case, given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """`fused_and_replayed` with the bad token left out of the comparison: NaN equals nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "equal", lambda a, b: without(BAD, a).equal(without(BAD, b)))
        return fused_and_replayed(case, given)


CHAINS: list[tuple[dict[str, str], torch.dtype, Plan]] = [
    *(({}, dtype, "replay") for dtype in DTYPES),
    ({}, torch.float32, "save"),
    ({}, torch.float32, "recover"),
    ({"preset": "code-cc"}, torch.float64, "replay"),
]


@pytest.mark.parametrize(
    ("options", "dtype", "memory", "backend"),
    [
        (*chain, backend)
        for chain in CHAINS
        for backend in ("reference", "fused")
        if (chain[1], backend) != (torch.float16, "fused")
    ],
    ids=str,
)
def test_residuals_around_branches(options: dict[str, str], dtype: torch.dtype, memory: Plan, backend: Backend) -> None:
    """Three sublayers, in the states of which a token is NaN from the start; branches see one token at a time.

    Fused fp16 is left to `test_one_step`: it would be four loops that no other test has compiled.
    """
    torch.manual_seed(0)
    stream = DeltaStream(12, value_channels=4, **{"rule": "delta"} | options)  # type: ignore[arg-type]
    branches = [nn.Sequential(nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 12)) for _ in range(3)]
    chain = stream.chain([stream.wrap(branch) for branch in branches]).to(dtype)
    use_backend(chain, backend)
    use_memory(chain, memory)
    state, cotangent = randn(7, 4, 12).to(dtype), randn(7, 4, 12, seed=1).to(dtype)

    def through(given: Tensor) -> tuple[Tensor, Tensor]:
        leaf = given.clone().requires_grad_()
        new = chain(leaf)
        new.backward(cotangent)
        assert leaf.grad is not None
        return new.detach(), leaf.grad

    clean = through(state)
    state[BAD, 0, 5] = math.nan
    for expected, found in zip(clean, through(state), strict=True):
        assert not found[BAD].isfinite().all()
        kept = without(BAD, found)
        assert kept.isfinite().all() and kept.equal(without(BAD, expected))

"""The fused step on the CPU, through its operator: values, all gradients, threads, compile, refusals."""

import importlib.util
from collections.abc import Mapping
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, PRESETS, GPTConfig, UserError, use_backend
from deepdelta.ops.step import Normalise, cpu, fused_problem, fused_step, remake
from helpers import randn
from step_cases import CASES, EPS, Case, compare, differentiated, in_dtype, inputs

# Every option in fp64; numba compiles each set of options and dtype anew, so the others take fewer.
TRIED = [
    *((case, torch.float64) for case in CASES[::4]),
    *((case, torch.float32) for case in CASES[1::9]),
    *((case, torch.bfloat16) for case in CASES[2::9]),
]


def fused(case: Case, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    parts = (given["state"], given["h"], given["write"], given.get("erase"), case.normalise)
    opening = (given.get("compression"), given.get("norm_weight"), EPS)
    result = fused_step(*parts, *opening, opens=case.opens)
    assert torch.equal(remake(result.done, given["state"]), result.state), "a replay is the forward's own bits"
    return result.state, result.c


@pytest.mark.parametrize(("case", "dtype"), TRIED, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    """What a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    try:
        compare(case, differentiated(fused, case, in_dtype(inputs(case), dtype)), dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def test_replay_at_a_width_of_many_vector_registers() -> None:
    for channels in (1, 4):
        case = Case(tokens=50, channels=channels, width=768)
        fused(case, in_dtype(inputs(case), torch.float32))


def test_shares_of_the_tokens_change_nothing_but_the_order_of_sums() -> None:
    case = Case(tokens=11)
    given = in_dtype(inputs(case), torch.float32)
    alone = differentiated(fused, case, given)
    with patch.object(cpu, "_shares", lambda tokens: 3):
        shared = differentiated(fused, case, given)
    for name, tensor in alone.items():
        if name in ("gradient of compression", "gradient of norm_weight"):
            torch.testing.assert_close(shared[name], tensor, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(shared[name], tensor), name


def test_the_operator_is_registered_rightly() -> None:
    given = inputs(Case())
    arguments = (given["state"], given["h"], given["write"], given["erase"], 1e-6, 1, given["compression"])
    leaves = [a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(torch.ops.deepdelta.step.default, (*leaves, given["norm_weight"].requires_grad_(), EPS, True))


def test_compiled_models_keep_their_graph_over_batches_and_lengths(unchecked: None) -> None:
    """fullgraph, values and gradients as eager, and one compilation for all shapes."""
    model = GPT(GPTConfig(vocab_size=31, dim=16, heads=2, layers=2, context=16, residual=PRESETS["ddl"])).double()
    use_backend(model, "fused")
    compilations = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch, tokens in ((2, 7), (3, 9), (5, 16), (4, 5)):
        ids = torch.randint(31, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
        results = []
        for forward in (model, compiled):
            model.zero_grad()
            output = forward(ids, ids)
            output.loss.backward()
            results.append(
                [output.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            )
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert len(compilations) == 1


def test_no_second_derivatives() -> None:
    state, h, write = (randn(*shape).requires_grad_() for shape in ((3, 2, 5), (3, 5), (3, 2)))
    new = fused_step(state, h, write, None, Normalise(1e-6, 1)).state
    (first,) = torch.autograd.grad(new.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_what_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_problem(torch.device("cpu"), torch.float32) is None
    half = torch.zeros(3, 2, 5, dtype=torch.float16)
    with pytest.raises(UserError, match="has fp32, fp64 and bf16, not fp16; use the backend 'reference'"):
        fused_step(half, half[:, 0], torch.zeros(3, 2), None, Normalise(1e-6, 1))
    model = GPT(GPTConfig(vocab_size=31, dim=16, heads=2, layers=1, context=8))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the fused step on cpu needs the package numba, which is not installed"):
        use_backend(model, "fused")
    chosen = use_backend(model, "auto")
    assert chosen.backend == "reference" and "numba" in chosen.reason

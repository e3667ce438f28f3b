"""The backend `auto`: what it takes in each call, without state, graph breaks or recompilation, and what it says."""

import importlib.util
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepdelta import GPT, PRESETS, DeltaStream, GPTConfig, ResidualConfig, UserError, use_backend
from deepdelta.nn import Chain, backend, rewriting
from deepdelta.nn.backend import LEAST, LEAST_COMPILED, LEAST_SIMPLE, Work, auto
from deepdelta.nn.runtime import backend_taken
from helpers import gradients, randn

CPU, CUDA, FP32 = torch.device("cpu"), torch.device("cuda"), torch.float32
ENOUGH = LEAST // (4 * 64)
"""Rows from which a state of V = 4 and d 64 is rewritten by fused code."""


@pytest.mark.parametrize(
    ("work", "device", "numbers", "compiled", "reason"),
    [
        (Work(1, 64, "additive"), CPU, None, False, "the rewrite is a plain addition"),
        (Work(1, 64, "additive"), CUDA, None, True, "the rewrite is a plain addition"),
        (Work(1, 64, "delta"), CPU, LEAST, False, None),
        (Work(1, 64, "delta", channel_first=True), CPU, None, False, "channel-first on the CPU at V = 1"),
        (Work(4, 64, "delta", channel_first=True), CPU, LEAST, False, None),
        (Work(1, 64, "delta"), CPU, LEAST - 1, False, "states of fewer than 8,192 numbers"),
        (Work(1, 768, "delta"), CPU, None, True, "compiled for the CPU at V = 1"),
        (Work(4, LEAST_COMPILED, "delta"), CPU, None, True, None),
        (Work(4, LEAST_COMPILED - 1, "delta"), CPU, None, True, "compiled for the CPU at d < 128"),
        (Work(4, 64, "additive"), CPU, LEAST_SIMPLE, False, None),
        (Work(4, 64, "channels"), CPU, LEAST_SIMPLE - 1, False, "states of fewer than 262,144 numbers"),
        (Work(1, 64, convolves=True), CPU, LEAST, False, None),
        (Work(1, 64, convolves=True), CPU, None, True, None),
        (Work(4, 64, convolves=True), CUDA, None, False, "fused convolutions are for the CPU"),
        (Work(4, 64, "delta"), torch.device("mps"), None, False, "there is no fused step for device 'mps'"),
    ],
)
def test_what_it_takes(work: Work, device: torch.device, numbers: int | None, compiled: bool, reason: str | None):
    chosen = auto(work, device, FP32, numbers=numbers, compiled=compiled)
    assert chosen == (("fused", "faster than plain PyTorch") if reason is None else ("reference", reason))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each fused step the numbers of its state."""
    step, seen = rewriting.fused_step, []

    def watched(state: Tensor, *given: Any, **others: Any) -> Any:
        seen.append(state.numel())
        return step(state, *given, **others)

    monkeypatch.setattr(rewriting, "fused_step", watched)
    return seen


def chain(**options: Any) -> Chain:
    torch.manual_seed(0)
    stream = DeltaStream(64, seed=0, **{"rule": "delta"} | options)
    return stream.chain([stream.wrap(nn.Linear(64, 64)) for _ in range(2)])


def test_each_call_is_decided_by_itself(fused: list[int]) -> None:
    made = chain()
    for rows, taken in ((ENOUGH - 1, 0), (ENOUGH, 2), (ENOUGH - 1, 0)):
        fused.clear()
        state = randn(rows, 4, 64).float()
        made(state)
        assert len(fused) == taken
    for name in ("fused", "reference", "auto"):
        use_backend(made, name)
        fused.clear()
        made(state[:3])
        made(randn(ENOUGH, 4, 64).float())
        assert len(fused) == {"fused": 4, "reference": 0, "auto": 2}[name]


def test_the_same_numbers_as_the_reference() -> None:
    made, state = chain().double(), randn(ENOUGH, 4, 64).requires_grad_()
    inputs, results = [state, *made.parameters()], []
    for name in ("auto", "reference"):
        use_backend(made, name)
        output = made(state)
        results.append([output.detach(), *gradients(output, inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_compiled_once_for_all_sizes(unchecked: None) -> None:
    """Without a graph break; on both sides of what decides eager calls."""
    graphs = []

    def counted(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    made = chain()
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend=counted)
    for rows in (5, ENOUGH + 3, 7):
        state = randn(rows, 4, 64).float()
        torch.testing.assert_close(compiled(state), made(state), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize(("dim", "operators"), [(LEAST_COMPILED, True), (LEAST_COMPILED // 2, False)])
def test_compiled_and_exported_by_width(dim: int, operators: bool, unchecked: None) -> None:
    stream = DeltaStream(dim, 4, seed=0, rule="delta")
    block, graphs = stream.wrap(nn.Linear(dim, dim)), []

    def kept(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(block, fullgraph=True, backend=kept)(torch.ones(2, 4, dim))
    torch.compiler.reset()
    assert ("deepdelta.step" in str(graphs[0].code)) is operators
    # What is exported runs without this package.
    assert "deepdelta.step" not in str(torch.export.export(block, (torch.ones(2, 4, dim),)).graph)


def test_what_it_stands_for_is_printed() -> None:
    stream = DeltaStream(64, seed=0, compression="token", rule="delta")
    block = stream.wrap(nn.Linear(64, 64))
    shown = "backend=auto: fused from 8,192 numbers of state"
    assert f"rule=delta, {shown}; compiled: reference (compiled for the CPU at d < 128)" in repr(block)
    assert f"(compression): TokenConvolution({shown})" in repr(block)
    assert f"dim=64, value_channels=4, rule=delta, residuals start as {shown}" in repr(stream)
    use_backend(block, "reference")
    assert "rule=delta, backend=reference" in repr(block)
    plain = DeltaStream(64, rule="additive").wrap(nn.Linear(64, 64))
    assert "backend=auto: reference (the rewrite is a plain addition)" in repr(plain)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "numba" else found(name, *a))
    backend.known_problem.cache_clear()
    backend._say.cache_clear()
    yield
    backend.known_problem.cache_clear()
    backend._say.cache_clear()


def test_without_numba_it_says_once_what_to_install(without_numba: None) -> None:
    made, state = chain(), randn(ENOUGH, 4, 64).float()
    made(state[:3])  # too small to need it
    with pytest.warns(RuntimeWarning, match=r"needs the package numba.*\(pip install numba\); until then"):
        expected = made(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(made(state), expected, rtol=0, atol=0)
        made.double()(state.double())
        assert "pip install numba" in repr(made[0])
    with pytest.raises(UserError, match="needs the package numba"):
        use_backend(made, "fused")


@pytest.mark.parametrize(
    ("preset", "rows", "compiled", "taken"),
    [("additive", 512, False, "reference"), ("paper-cc", 512, False, "fused"), ("paper-cc", 9, False, "reference")],
)
def test_of_a_whole_model(preset: str, rows: int, compiled: bool, taken: str) -> None:
    model = GPT(GPTConfig(vocab_size=31, dim=64, heads=2, layers=1, context=8, residual=PRESETS[preset]))
    assert backend_taken(model, rows, compiled=compiled).backend == taken
    use_backend(model, "fused")
    assert backend_taken(model, rows) == ("fused", "asked for")


def test_a_convolution_is_decided_apart_from_the_rewrite() -> None:
    settings = ResidualConfig(rule="additive", value_channels=1, compression="token", compression_init="random")
    model = GPT(GPTConfig(vocab_size=31, dim=64, heads=2, layers=1, context=8, residual=settings))
    assert backend_taken(model, 4096).backend == "fused"
    assert "TokenConvolution(backend=auto: fused" in repr(model) and "rule=additive, backend=auto: reference" in repr(
        model
    )


def test_numba_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys, torch, deepdelta\n"
        "stream = deepdelta.DeltaStream(64); block = stream.wrap(torch.nn.Linear(64, 64))\n"
        "block(torch.ones(3, 4, 64)); print('numba' in sys.modules)\n"
        "block(torch.ones(300, 4, 64)); print('numba' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]

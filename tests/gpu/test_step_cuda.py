"""The fused step on a real GPU: values and gradients against fp64, large sizes, torch.compile, graphs, training.

make gpu     or, from the source tree: PYTHONPATH=src python -m pytest -c tests/gpu/pytest.ini tests/gpu
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, PRESETS, GPTConfig, use_backend, use_memory
from deepdelta.decoding import DecodingCache
from deepdelta.ops.step import Normalise, fused_step
from helpers import perturb
from step_cases import (
    EDGES,
    EPS,
    SMALL_TILES,
    Case,
    compare,
    differentiated,
    fused_and_replayed,
    gating,
    in_dtype,
    inputs,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's own, from inside torch.compile
    pytest.mark.usefixtures("fresh_dynamo"),
]
GATES = [("none", ""), *itertools.product(("one", "each"), ("", "both", "erase", "write", "added", "one"))]
EVERY = [
    Case(channels=v, width=d, gates=gates, made=made, power=power, offset=offset, opening=opening, tiled=tiled)
    for v, d, (gates, made), power, offset, opening, tiled in itertools.product(
        (1, 2, 3, 5), (5, 33, 100), GATES, (0, 1, 2), (1e-6, 33.0), ("norm", "closed", "open"), (False, True)
    )
]
CASES = random.Random(0).sample(EVERY, 48) + EDGES
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LARGE = [
    Case(tokens=333, channels=channels, width=width, gates=gates)
    for channels, width, gates in [
        (1, 768, "one"),
        (4, 768, "each"),
        (8, 1000, "one"),
        (16, 768, "one"),
        (4, 5000, "one"),
    ]
]
LARGE += [
    Case(tokens=333, channels=channels, width=width, made=made)
    for made, channels, width in itertools.product(("both", "added"), (1, 4, 16), (768, 2048, 4096))
]


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """What torch.empty makes is NaN until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_values_and_all_gradients(case, dtype):
    from deepdelta.ops.backends.cuda import tiles

    with patch.multiple(tiles, **(SMALL_TILES if case.tiled else {"TILE": tiles.TILE})):
        found = differentiated(fused_and_replayed, case, in_dtype(inputs(case), dtype, "cuda"))
    compare(case, found, dtype)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_results_repeat(case, dtype):
    given = in_dtype(inputs(case), dtype, "cuda")
    first, second = (differentiated(fused_and_replayed, case, given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_more_numbers_than_32_bits_count():
    """The last tokens of a state of more than 2^31 numbers come out as they do by themselves, forward and backward."""
    tokens, channels, width = 2**31 // (4 * 1024) + 64, 4, 1024
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    last = inputs(Case(tokens=64, channels=channels, width=width))
    # Only the last tokens hold numbers: the sums over all tokens are theirs.
    given = in_dtype(last, torch.bfloat16, "cuda")
    for name in ("state", "h", "write", "erase"):
        whole = given[name].new_zeros(tokens, *given[name].shape[1:])
        whole[-64:] = given[name]
        given[name] = whole
    outputs = []
    for part in (given, in_dtype(last, torch.bfloat16, "cuda")):
        leaves = {name: tensor.requires_grad_() for name, tensor in part.items()}
        new, c = fused_and_replayed(Case(), leaves)
        (new[-64:].float().sum() + c[-64:].float().square().sum()).backward()
        outputs.append([new[-64:].detach(), c[-64:].detach(), leaves["state"].grad[-64:], leaves["h"].grad[-64:]])
        sums = [leaves["compression"].grad, leaves["norm_weight"].grad]
        outputs[-1] += sums
    for many, few in zip(*(o[:4] for o in outputs), strict=True):
        assert torch.equal(many, few)
    for many, few in zip(*(o[4:] for o in outputs), strict=True):
        torch.testing.assert_close(many, few, rtol=1e-4, atol=1e-4)


def test_compiled_without_breaks_and_without_recompiling_for_another_batch():
    compiled = torch.compile(fused_step, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 16, 33):
            case = Case(tokens=tokens, channels=4, width=768)
            given = in_dtype(inputs(case), torch.bfloat16, "cuda")

            def run(case: Case, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
                order = [parts[name] for name in ("state", "h", "write", "erase")]
                opening = (parts["compression"], parts["norm_weight"], EPS, True)
                return compiled(*order, Normalise(case.offset, case.power), *opening)[:2]

            found, eager = differentiated(run, case, given), differentiated(fused_and_replayed, case, given)
            assert all(torch.equal(found[name], eager[name]) for name in eager)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("preset", ["paper-cc", "additive"])
def test_training_steps_follow_the_reference(preset, compiled):
    """Four optimiser steps of a small GPT: fused and plain PyTorch lose the same."""
    losses = {}
    ids = torch.randint(96, (4, 65), generator=torch.Generator().manual_seed(0)).cuda()
    for backend in ("reference", "fused"):
        model = GPT(GPTConfig(vocab_size=96, dim=96, heads=2, layers=3, context=64, residual=PRESETS[preset]))
        perturb(model, size=0.02)
        model = model.cuda()
        use_backend(model, backend)
        run = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[backend] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(ids[:, :-1], ids[:, 1:]).loss
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["reference"], rel=2e-4)
    assert losses["fused"][-1] < losses["fused"][0]


def small_gpt(preset: str) -> GPT:
    model = GPT(GPTConfig(vocab_size=96, dim=96, heads=2, layers=3, context=64, residual=PRESETS[preset]))
    perturb(model, size=0.02)
    model = model.cuda()
    use_backend(model, "fused")
    return model


def some_ids() -> Tensor:
    return torch.randint(96, (4, 65), generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.usefixtures("unwritten_is_nan")
def test_training_repeats_to_the_bit(monkeypatch):
    """Two runs of three steps under torch.use_deterministic_algorithms: every parameter has the same bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ids, found = some_ids(), []
    for _ in range(2):
        model = small_gpt("paper-cc")
        use_memory(model, "replay")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).loss.backward()
            optimizer.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


def captured(run):
    """A CUDA graph of the call, and what it returned while it was captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph, made


@pytest.mark.parametrize("preset", ["paper-cc", "paper-scalar"])
def test_a_step_of_training_in_a_graph(preset):
    """Forward, backward and AdamW captured once, replayed on other ids: what the eager model does."""
    ids = torch.stack([some_ids(), some_ids().flip(1), some_ids().roll(7, 1)])
    losses = []
    for graphed in (False, True):
        model = small_gpt(preset)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3).cuda(), capturable=True)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        given = ids[0].clone()

        def step(model=model, optimizer=optimizer, given=given):
            optimizer.zero_grad(set_to_none=False)
            loss = model(given[:, :-1], given[:, 1:]).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        graph, loss = captured(step) if graphed else (None, step())
        with torch.no_grad():
            for parameter, first in zip(model.parameters(), start, strict=True):
                parameter.copy_(first)
                for state in optimizer.state[parameter].values():
                    state.zero_()
        losses.append([])
        for part in ids:
            given.copy_(part)
            if graph is None:
                loss = step()
            else:
                graph.replay()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["paper-cc", "paper-scalar"])
def test_decoding_in_a_graph(preset):
    """The whole context token by token as one graph, replayed on other ids: the logits of the uncached model."""
    model, ids = small_gpt(preset).eval(), some_ids()[:, :64]
    cache, given = DecodingCache(model, batch=4), ids.flip(1).clone()

    def run():
        cache.clear()
        return torch.cat([cache.decode(given[:, t : t + 1]) for t in range(given.shape[1])], 1)

    graph, logits = captured(run)
    given.copy_(ids)
    graph.replay()
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_step_waits_for_nothing():
    """No call of the fused step, forward or backward, makes the host wait for the device."""
    case = EDGES[0]
    given = {name: tensor.requires_grad_() for name, tensor in in_dtype(inputs(case), torch.float32, "cuda").items()}
    opening = (given["compression"], given["norm_weight"], EPS, True)

    def run():
        made = gating(case, given)
        state, c, _ = fused_step(given["state"], given["h"], 0.0, None, case.normalise, *opening, made)
        torch.autograd.backward((state, c), (torch.ones_like(state), torch.ones_like(c)))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The fused step on the CPU, through its operator: values, all gradients, threads, compile, refusals."""

import importlib.util

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, PRESETS, GPTConfig, UserError, use_backend
from deepdelta.ops.convolution import compress_tokens, expand_tokens
from deepdelta.ops.step import Gating, Normalise, fused_problem, fused_step, rewrite_step
from helpers import perturb, randn
from step_cases import EPS, Case, compare, differentiated, fused_and_replayed, in_dtype, inputs
from step_pairs import CASES

# Every option in fp64; numba compiles each set of options and dtype anew, so the others take fewer.
TRIED = [
    *((case, torch.float64) for case in CASES[::4]),
    *((case, torch.float32) for case in CASES[1::9]),
    *((case, torch.bfloat16) for case in CASES[2::9]),
    *((case, torch.float16) for case in (Case(), Case(vector="tiny"), CASES[21])),
]


@pytest.mark.parametrize(("case", "dtype"), TRIED, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    """What a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    try:
        compare(case, differentiated(fused_and_replayed, case, in_dtype(inputs(case), dtype)), dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def test_replay_at_a_width_of_many_vector_registers() -> None:
    for channels in (1, 4):
        case = Case(tokens=50, channels=channels, width=768)
        fused_and_replayed(case, in_dtype(inputs(case), torch.float32))


def test_shares_of_the_tokens_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepdelta.ops.backends.cpu import records

    monkeypatch.setattr(records, "SHARE", 1)
    case = Case(tokens=11)
    given = in_dtype(inputs(case), torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(differentiated(fused_and_replayed, case, given))
    finally:
        torch.set_num_threads(before)
    alone, shared = results
    for name, tensor in alone.items():
        if name in ("gradient of compression", "gradient of norm_weight"):
            torch.testing.assert_close(shared[name], tensor, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(shared[name], tensor), name


GATINGS = [
    *((gates, *kind, True) for gates in (1, 3) for kind in ((True, True), (True, False), (False, True))),
    *((gates, targets, True, False) for gates in (1, 3) for targets in (True, False)),
]


@pytest.mark.parametrize(("gates", "targets", "erases", "scales"), GATINGS, ids=str)
def test_coefficients_made_of_a_gating(gates: int, targets: bool, erases: bool, scales: bool) -> None:
    """In the kernel's own pass, against the same in plain PyTorch: values, and gradients of everything."""
    given = inputs(Case(tokens=11))
    numbers = 2 * randn(11, gates + 3 * targets, seed=5)
    names = ("state", "h", "compression", "norm_weight")
    results = []
    for kernel in (True, False):
        leaves = {name: given[name].clone().requires_grad_() for name in names}
        leaves |= {"numbers": numbers.clone().requires_grad_(), "factor": randn(1, seed=8).requires_grad_()}
        state, h, compression, norm_weight, leaf, factor = leaves.values()
        gating = Gating(leaf, gates, erases, None if scales else 0.3, None if scales else factor)
        opening = (compression, norm_weight, EPS)
        if kernel:
            new, c, _ = fused_step(state, h, 0.0, None, Normalise(1e-6, 1), *opening, opens=True, gating=gating)
            assert c is not None
        else:
            write, erase = gating.coefficients()
            write = torch.full((11, 3), write, dtype=h.dtype) if isinstance(write, float) else write
            new, c = rewrite_step(state, h, write, erase, Normalise(1e-6, 1), *opening)
        loss = (new * randn(*new.shape, seed=6)).sum() + (c * randn(*c.shape, seed=7)).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        results.append([new.detach(), c.detach(), *gradients])
    for name, one, other in zip(("state", "c", *names, "numbers", "factor"), *results, strict=True):
        if one is None or other is None:
            assert name == "factor" and scales and one is other
            continue
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=name)


def test_the_operator_is_registered_rightly() -> None:
    given = {name: tensor.requires_grad_() for name, tensor in inputs(Case()).items()}
    state, h, compression, weight = (given[name] for name in ("state", "h", "compression", "norm_weight"))
    numbers = randn(7, 1 + 3).requires_grad_()
    factor = randn(1).requires_grad_()
    for how in (
        (None, 0, False, None, None, given["write"], given["erase"]),
        (numbers, 1, True, None, None, None, None),
        (numbers, 1, True, 0.3, factor, None, None),
    ):
        arguments = (state, h, *how, 1e-6, 1, compression, weight, EPS, True)
        torch.library.opcheck(torch.ops.deepdelta.step.default, arguments)
    taps = randn(3, 4, 7).requires_grad_()
    for channels, outputs in ((1, 3), (3, 1)):
        x = randn(2, 5, channels, 7).requires_grad_()
        torch.library.opcheck(torch.ops.deepdelta.convolve_tokens.default, (x, taps, outputs))


def expansion_by_torch(x_BTD: Tensor, weight_VDK: Tensor) -> Tensor:
    channels, width, taps = weight_VDK.shape
    padded = torch.nn.functional.pad(x_BTD.transpose(1, 2), (taps - 1, 0))
    kernels = weight_VDK.transpose(0, 1).reshape(width * channels, 1, taps)
    return torch.conv1d(padded, kernels, groups=width).unflatten(1, (width, channels)).permute(0, 3, 2, 1)


def compression_by_torch(x_BTVD: Tensor, weight_VDK: Tensor) -> Tensor:
    """Every value channel on its own, then their sum."""
    width, taps = weight_VDK.shape[1:]
    padded = torch.nn.functional.pad(x_BTVD.permute(2, 0, 3, 1), (taps - 1, 0))
    each = [torch.conv1d(x, w[:, None], groups=width) for x, w in zip(padded, weight_VDK, strict=True)]
    return torch.stack(each).sum(0).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(8, 5, 3, 33, 4), (1, 1, 2, 5, 3), (2, 3, 2, 1, 6), (2, 9, 5, 100, 1), (3, 6, 1, 7, 4)], ids=str
)
@pytest.mark.parametrize("expands", [True, False], ids=["expansion", "compression"])
def test_convolutions_over_tokens(expands: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against torch's convolution in fp64: values and gradients; texts shorter than the taps too."""
    batch, tokens, channels, width, taps = shape
    vectors, states = (batch, tokens, width), (batch, tokens, channels, width)
    given, made = (vectors, states) if expands else (states, vectors)
    x, weight = randn(*given).to(dtype), randn(channels, width, taps, seed=1)
    cotangent = randn(*made, seed=2).to(dtype)
    a, w = x.double().clone().requires_grad_(), weight.clone().requires_grad_()
    expected = (expansion_by_torch if expands else compression_by_torch)(a, w)
    expected.backward(cotangent.double())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours, ours_weight = x.clone().requires_grad_(), weight.to(wide).requires_grad_()
    y = (expand_tokens if expands else compress_tokens)(ours, ours_weight)
    y.backward(cotangent)
    assert a.grad is not None and w.grad is not None and ours.grad is not None and ours_weight.grad is not None
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for one, other in ((y, expected), (ours.grad, a.grad), (ours_weight.grad, w.grad)):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_narrow_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """All 65,536 times factors that lead through all sizes, by a convolution of one tap."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None, :, None]
    factors = torch.tensor([1.0, -0.3, 7e-3, 3e-5, 2.0**-10, 1.0 + 2.0**-11, 900.0, 1e30])
    y = expand_tokens(x, factors[:, None, None])
    torch.testing.assert_close(y[0, ..., 0], (x[0].float() * factors).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_compiled_models_keep_their_graph_over_batches_and_lengths(unchecked: None) -> None:
    """fullgraph, values and gradients as eager, and one compilation for all shapes."""
    model = GPT(GPTConfig(vocab_size=31, dim=16, heads=2, layers=2, context=16, residual=PRESETS["paper-cc"])).double()
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


def test_what_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_problem(torch.device("cpu"), torch.float32) is None
    tiny = torch.zeros(3, 2, 5, dtype=torch.float8_e5m2)
    with pytest.raises(UserError, match=r"has fp64, fp32, bf16, fp16, not .*float8_e5m2; use the backend 'reference'"):
        fused_step(tiny, tiny[:, 0], torch.zeros(3, 2), None, Normalise(1e-6, 1))
    model = GPT(GPTConfig(vocab_size=31, dim=16, heads=2, layers=1, context=8))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the fused step on cpu needs the package numba, which is not installed"):
        use_backend(model, "fused")


def test_the_same_bits_wherever_memory_lies():
    """Gradients do not depend on the addresses of tensors and scratch, which the blocks in between move about."""
    torch.manual_seed(0)
    ids = torch.randint(50, (3, 17))
    model = GPT(GPTConfig(vocab_size=50, dim=16, heads=2, layers=2, context=16, residual=PRESETS["paper-cc"]))
    perturb(model, size=0.02)
    use_backend(model, "fused")
    first: list[torch.Tensor] = []
    for _ in range(100):
        blocks = [torch.empty(size) for size in torch.randint(1, 5000, (20,)).tolist()]
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        first = first or gradients
        assert all(map(torch.equal, gradients, first))
        del blocks

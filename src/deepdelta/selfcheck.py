"""Whether this machine computes the rewrite and its gradients rightly: what `deepdelta doctor` prints."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from deepdelta.ops.precision import accumulation_dtype
from deepdelta.ops.step import Normalise, fused_problem, fused_step, rewrite_step

SIZES = ((33, 1, 257), (33, 4, 100), (7, 5, 33))
"""Tokens, value channels and width of the trials: odd, and no power of two."""

NORMALISE = Normalise(1e-10, 1)
ALLOWANCE = 3.0
"""The error against fp64 may be this many times that of plain PyTorch in the same dtype, or a few units of rounding."""


@dataclass(frozen=True)
class Check:
    """One backend, device and dtype: errors against fp64, relative to the largest number of each tensor."""

    backend: str
    device: str
    dtype: str
    value_error: float | None
    """Largest over X' and c'; None where the backend cannot run."""
    gradient_error: float | None
    """Largest over all gradients."""
    verdict: str
    """ok, WRONG, or why the backend cannot run."""


def self_check() -> Iterator[Check]:
    """Try every backend on every device of this machine, in fp32, bf16 and fp16, against fp64 on the CPU."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device, dtype in product(devices, (torch.float32, torch.bfloat16, torch.float16)):
        plain = [_errors(_reference, size, device, dtype) for size in SIZES]
        yield _check("reference", device, dtype, plain, [(0.0, 0.0)] * len(SIZES))
        if problem := fused_problem(torch.device(device), dtype):
            yield Check("fused", device, _name(dtype), None, None, problem)
        else:
            yield _check("fused", device, dtype, [_errors(_fused, size, device, dtype) for size in SIZES], plain)


def _check(
    backend: str,
    device: str,
    dtype: torch.dtype,
    errors: list[tuple[float, float]],
    plain: list[tuple[float, float]],
) -> Check:
    rounding = 64 * torch.finfo(dtype).eps
    good = all(
        error <= max(rounding, ALLOWANCE * usual)
        for pair, usuals in zip(errors, plain, strict=True)
        for error, usual in zip(pair, usuals, strict=True)
    )
    value, gradient = (max(found) for found in zip(*errors, strict=True))
    return Check(backend, device, _name(dtype), value, gradient, "ok" if good else "WRONG")


Step = Callable[..., tuple[Tensor, Tensor]]


def _reference(
    state: Tensor, h: Tensor, write: Tensor, erase: Tensor, c: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    return rewrite_step(state, h, write, erase, NORMALISE, c, weight, 1e-5)


def _fused(state: Tensor, h: Tensor, write: Tensor, erase: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    result = fused_step(state, h, write, erase, NORMALISE, c, weight, 1e-5, opens=True)
    assert result.c is not None
    return result.state, result.c


def _errors(step: Step, size: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative errors of the outputs and of the gradients under random cotangents."""
    tokens, channels, width = size
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, channels, width), (tokens, width), (tokens, channels), (tokens, 1), (channels, width), (width,)]
    dtypes = [dtype, dtype] + [accumulation_dtype(dtype)] * 4
    given = [torch.randn(s, generator=generator).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    cotangents = [torch.randn(s, generator=generator).to(dtype) for s in (shapes[0], shapes[1])]
    results = []
    for run, where, kind in ((step, device, None), (_reference, "cpu", torch.float64)):
        inputs = [tensor.to(device=where, dtype=kind or tensor.dtype).detach().requires_grad_() for tensor in given]
        outputs = run(*inputs)
        torch.autograd.backward(outputs, [c.to(device=where, dtype=kind or c.dtype) for c in cotangents])
        results.append(([o.detach().cpu() for o in outputs], [i.grad.cpu() for i in inputs if i.grad is not None]))
    (values, gradients), (true_values, true_gradients) = results
    return _largest(values, true_values), _largest(gradients, true_gradients)


def _largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("inf")


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

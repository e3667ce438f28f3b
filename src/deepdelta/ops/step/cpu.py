"""The fused step on the CPU: numba's loops over torch's memory, the tokens shared out among torch's threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepdelta.ops.precision import accumulation_dtype
from deepdelta.ops.step import cpu_kernel
from deepdelta.ops.step.reference import Normalise

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def forward(
    state: Tensor,
    h: Tensor,
    write: Tensor,
    erase: Tensor | None,
    normalise: Normalise,
    compression: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    opens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X', c' (empty unless `opens`), and for later the scale, the raw read, 1 / rms of x_in' and the a of X + h a^T."""
    tokens, channels, _ = state.shape
    one, wide = _one(state.dtype), accumulation_dtype(state.dtype)
    new = torch.empty_like(state)
    c = torch.empty_like(h) if opens else h.new_empty(0)
    scale, inverse = state.new_empty(tokens, dtype=wide), state.new_empty(tokens, dtype=wide)
    read = state.new_empty((tokens, channels) if erase is not None else (0, 0), dtype=wide)
    coefficient = torch.empty_like(write)
    offset = None if normalise.offset is None else type(one)(normalise.offset)
    given = (_array(state), _array(h), _array(write), _array(erase), offset, normalise.power)
    opening = (_array(compression), _array(norm_weight)) if opens else (None, None)
    later = (_array(scale), _array(read), _array(inverse), _array(coefficient))
    filled = (_array(new), _array(c) if opens else None, *later)

    def share(index: int, first: int, last: int) -> None:
        cpu_kernel.forward(first, last, one, *given, *opening, type(one)(norm_eps), *filled)

    _over_tokens(share, tokens)
    return new, c, scale, read, inverse, coefficient


def backward(
    state: Tensor,
    h: Tensor,
    write: Tensor,
    erase: Tensor | None,
    normalise: Normalise,
    compression: Tensor | None,
    norm_weight: Tensor | None,
    opens: bool,
    scale: Tensor,
    read: Tensor,
    inverse: Tensor,
    coefficient: Tensor,
    d_new: Tensor,
    d_c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of state, h, write, erase, compression and norm weight (None where there is none)."""
    tokens, one = state.shape[0], _one(state.dtype)
    d_state, d_h, d_write = torch.empty_like(state), torch.empty_like(h), torch.empty_like(write)
    d_erase = None if erase is None else torch.empty_like(erase)
    shares = _shares(tokens)
    sums = [None if not opens or p is None else p.new_zeros(shares, *p.shape) for p in (compression, norm_weight)]
    offset = None if normalise.offset is None else type(one)(normalise.offset)
    given = (_array(state), _array(h), _array(write), _array(erase), offset, normalise.power)
    opening = (_array(compression), _array(norm_weight)) if opens else (None, None)
    known = (_array(scale), _array(read), _array(inverse), _array(coefficient))
    incoming = (_array(d_new), _array(d_c) if opens else None)
    filled = (_array(d_state), _array(d_h), _array(d_write), _array(d_erase))

    def share(index: int, first: int, last: int) -> None:
        own = [None if total is None else _array(total[index]) for total in sums]
        cpu_kernel.backward(first, last, one, *given, *opening, *known, *incoming, *filled, *own)

    _over_tokens(share, tokens)
    d_compression, d_weight = (None if total is None else total.sum(0) for total in sums)
    return d_state, d_h, d_write, d_erase, d_compression, d_weight


def replay(state: Tensor, h: Tensor, coefficient: Tensor) -> Tensor:
    """X + h a^T: X' again, bit for bit, from the a that the forward pass stored."""
    new = torch.empty_like(state)
    given = (_array(state), _array(h), _array(coefficient), _array(new))
    _over_tokens(lambda index, first, last: cpu_kernel.replay(first, last, *given), state.shape[0])
    return new


def _one(dtype: torch.dtype) -> Any:
    return np.float64(1) if dtype == torch.float64 else np.float32(1)


def _array(tensor: Tensor | None) -> Any:
    """The tensor's own memory; bf16, which numpy lacks, as its 16 bits."""
    if tensor is None:
        return None
    plain = tensor.detach()
    return plain.view(torch.uint16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()


def _shares(tokens: int) -> int:
    """How many threads share the tokens.

    After each of its own operations, torch's other threads spin for a while on their cores. Of two cores that leaves
    one, and a second thread of ours would wait for the other longer than its half of the work takes (measured at two).
    """
    threads = torch.get_num_threads()
    return max(1, min(threads, tokens)) if threads >= 4 else 1


def _over_tokens(share: Callable[[int, int, int], None], tokens: int) -> None:
    """share(index, first, last) for equal shares of the tokens, one per thread of torch."""
    shares = _shares(tokens)
    bounds = [tokens * index // shares for index in range(shares + 1)]
    others = (
        [_pool(shares - 1).submit(share, i, bounds[i], bounds[i + 1]) for i in range(1, shares)] if shares > 1 else []
    )
    share(0, bounds[0], bounds[1])
    for other in others:
        other.result()


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="deepdelta-step")

"""Cases of the fused step that its kernels are held to, in Triton's interpreter and on a GPU.

What they are compared with: `rewrite_step` in fp64 with autograd. Names as in the reference: X (N, V, D), h (N, D),
w (N, V), b (N, 1) or (N, V), or the numbers of a gating in their place, C (V, D), the norm's weight (D).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from deepdelta.ops.precision import accumulation_dtype
from deepdelta.ops.step import fused_step, remake
from deepdelta.ops.step.reference import Gating, Normalise, rewrite_along, rewrite_step
from helpers import randn

EPS = 1e-5
SMALL_TILES = {"WHOLE_FORWARD": 8, "WHOLE_BACKWARD": 8, "TILE": 64}
"""Limits of ops/backends/cuda/tiles under which a case of ordinary width needs several tiles."""


class Case(NamedTuple):
    tokens: int = 7
    channels: int = 3
    width: int = 33
    gates: str = "one"
    """none, one (for all value channels) or each."""
    offset: float | None = 1e-6
    power: int = 1
    opening: str = "norm"
    """closed; open: c' without a norm; norm; alone: with a norm and no compression, for one value channel."""
    vector: str = "random"
    """h: random, or with tokens that are zero or tiny."""
    tiled: bool = False
    """Whether the kernels have to go through a token in small tiles."""
    made: str = ""
    """Whether w and b are made of a gating: both, erase (nothing is written) or write (nothing is erased); added (the
    gate, with a factor, is the erase's alone) or one (the same, and 1 is written)."""

    @property
    def normalise(self) -> Normalise:
        return Normalise(self.offset, self.power)

    @property
    def opens(self) -> bool:
        return self.opening != "closed"

    def __str__(self) -> str:
        return "-".join(str(part) for part in self)


EDGES = [
    *(Case(tokens=3, channels=channels, width=5, made="both", gates="each") for channels in (33, 65, 129)),
    *(Case(tokens=3, channels=2, width=width, made="both") for width in (1, 3, 1025)),
]
"""Value channels and widths just beyond a power of two, and the least."""


def inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """What the step takes, by name; fp64, and exact in bf16, fp16 and fp32."""
    tokens, channels, width = case.tokens, case.channels, case.width
    shapes: dict[str, tuple[int, ...]] = {
        "state": (tokens, channels, width),
        "h": (tokens, width),
        "write": (tokens, channels),
    }
    if case.made:
        del shapes["write"]
        gates = 1 if case.gates == "one" else channels
        shapes["numbers"] = (tokens, gates + (0 if case.made in ("erase", "one") else channels))
        if case.made in ("added", "one"):
            shapes["factor"] = (1,)
    elif case.gates != "none":
        shapes["erase"] = (tokens, 1 if case.gates == "one" else channels)
    if case.opening in ("norm", "open"):
        shapes["compression"] = (channels, width)
    if case.opening in ("norm", "alone"):
        shapes["norm_weight"] = (width,)
    given = {name: randn(*shape, seed=seed + i).mul(8).round().div(8) for i, (name, shape) in enumerate(shapes.items())}
    if case.vector == "zero":
        given["h"][::2] = 0
    if case.vector == "tiny":
        given["h"][::2] *= 2.0**-24  # representable in fp16, and far below the root of the smallest offset
    if case.opening == "open" and channels == 1:
        del given["compression"]
    return given


def cotangents(case: Case, seed: int = 100) -> tuple[Tensor, Tensor]:
    new = randn(case.tokens, case.channels, case.width, seed=seed).mul(8).round().div(8)
    return new, randn(case.tokens, case.width, seed=seed + 1).mul(8).round().div(8)


def in_dtype(given: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """State and h in `dtype`, the rest in the precision of its sums."""
    wide = accumulation_dtype(dtype)
    return {name: t.to(device, dtype if name in ("state", "h") else wide) for name, t in given.items()}


def gating(case: Case, given: Mapping[str, Tensor]) -> Gating | None:
    gates = 1 if case.gates == "one" else case.channels
    if not case.made:
        return None
    return Gating(
        given["numbers"], gates, case.made != "write", 0.3 if "factor" in given else None, given.get("factor")
    )


def reference(case: Case, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    state, h, write, erase = given["state"], given["h"], given.get("write"), given.get("erase")
    if (made := gating(case, given)) is not None:
        write, erase = made.coefficients()
        if isinstance(write, float):
            write = state.new_full(state.shape[:-1], write, dtype=accumulation_dtype(state.dtype))
    if case.opens:
        parameters = (given.get("compression"), given.get("norm_weight"))
        return rewrite_step(state, h, write, erase, case.normalise, *parameters, EPS)
    return rewrite_along(state, h, write, erase, case.normalise).state, None


def fused_and_replayed(case: Case, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """X' and c' of the fused step, whose X' made again must be the same to the bit."""
    new, c, done = fused_step(
        given["state"],
        given["h"],
        given.get("write", 0.0),
        given.get("erase"),
        case.normalise,
        given.get("compression"),
        given.get("norm_weight"),
        EPS,
        case.opens,
        gating(case, given),
    )
    assert torch.equal(remake(done, given["state"]), new)
    return new, c


def differentiated(
    step: Callable[[Case, Mapping[str, Tensor]], tuple[Tensor, Tensor | None]], case: Case, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """X', c' and the gradients of all inputs under random cotangents, by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    new, c = step(case, leaves)
    outputs = {"new": new} if c is None else {"new": new, "c": c}
    along = [cotangent.to(out) for cotangent, out in zip(cotangents(case), outputs.values(), strict=False)]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), along)
    named = dict(zip([f"gradient of {name}" for name in leaves], gradients, strict=True))
    return {name: tensor.detach() for name, tensor in (outputs | named).items()}


def compare(case: Case, actual: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """`actual` against fp64: within rounding for fp64, else at most a little worse than plain PyTorch in that dtype."""
    given = inputs(case)
    expected = differentiated(reference, case, given)
    assert actual.keys() == expected.keys()
    eager = differentiated(reference, case, in_dtype(given, dtype))
    for name, truth in expected.items():
        assert actual[name].dtype == eager[name].dtype, name
        # Inputs and cotangents are about 1, and so is what cancels in a gradient that is smaller than that.
        size = max(1.0, float(truth.abs().max()))
        error, allowed = (float((side[name].double().cpu() - truth).abs().max()) for side in (actual, eager))
        # fp32 sums in another order; one more rounding where eager happened to have none.
        allowed = 1.5 * allowed + size * (1e-12 if dtype == torch.float64 else 1e-5) + 0.25 * size * eps_of(dtype, name)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, size {size:.2e}"


def eps_of(dtype: torch.dtype, name: str) -> float:
    """The spacing of what is stored in the state's dtype; 0 for what stays in the precision of sums."""
    in_state_dtype = name in ("new", "c", "gradient of state", "gradient of h")
    return torch.finfo(dtype).eps if in_state_dtype and dtype not in (torch.float32, torch.float64) else 0.0

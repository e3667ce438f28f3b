"""A chain of residuals is its members called one by one, in values, gradients and messages."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepdelta
from deepdelta import DeltaStream, Intervention, UserError, intervening, recording, use_backend, use_memory
from deepdelta.nn import Chain, norms, rewriting
from helpers import gradients, perturb, randn

pytestmark = pytest.mark.usefixtures("unchecked_file")
D = 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
OPTIONS: dict[str, dict[str, Any]] = {
    "delta": {},
    "additive": {"rule": "additive"},
    "two_gate": {"rule": "two_gate", "gate_per_channel": True},
    "rank 2": {"rank": 2, "direction_norm": "bounded"},
    "token": {"compression": "token"},
    "x_in": {"target": "scaled_sigmoid", "norm": "none"},
}
both_backends = pytest.mark.parametrize("backend", ["reference", "fused"])


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, c: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        return scale * self.map(c) if mask is None else scale * self.map(c) * mask


class Doubled(nn.Module):
    """Takes a state and nothing else."""

    def forward(self, state: Tensor) -> Tensor:
        return 2 * state


def members(stream: DeltaStream) -> list[nn.Module]:
    torch.manual_seed(0)
    first = stream.wrap(Branch())
    shared = stream.wrap(Branch(), share_compression=first)
    return [nn.Identity(), first, shared, Doubled(), *(stream.wrap(Branch()) for _ in range(3)), nn.LayerNorm(D)]


def chain_of(
    channels: int = 4, backend: str = "reference", dtype: torch.dtype = torch.float64, **options: Any
) -> Chain:
    stream = DeltaStream(D, channels, seed=1, **{"rule": "delta"} | options)
    chain = stream.chain(members(stream)).to(dtype)
    perturb(chain, size=0.1)
    use_backend(chain, backend)
    return chain


def one_by_one(chain: nn.Sequential, state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for member in chain:
        state = member(state, *args, **kwargs) if isinstance(member, deepdelta.DeltaResidual) else member(state)
    return state


def state_of(channels: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(2, 5, channels, D).to(dtype).requires_grad_()


def agree(chain: Chain, state: Tensor, *args: Any, **kwargs: Any) -> None:
    one, other = chain(state, *args, **kwargs), one_by_one(chain, state, *args, **kwargs)
    inputs, tolerance = [state, *chain.parameters()], TOLERANCE[state.dtype]
    assert distance(one, other) <= tolerance
    for a, b in zip(gradients(one, inputs), gradients(other, inputs), strict=True):
        # Sums over all tokens, of which fp32 rounds each.
        assert distance(a, b) <= tolerance * (1 if state.dtype == torch.float64 else 5)


def distance(one: Tensor, other: Tensor) -> float:
    """|one - other| as a share of |other|, or as it is where that is less than 1."""
    one, other = one.detach(), other.detach()
    return float((one - other).norm() / other.norm().clamp(min=1.0))


@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    [
        *(("reference", dtype, name) for dtype in TOLERANCE for name in OPTIONS),
        *(("fused", torch.float64, name) for name in OPTIONS),
        ("fused", torch.float32, "delta"),
    ],
)
@pytest.mark.parametrize("channels", [1, 4])
def test_values_and_gradients(backend: str, dtype: torch.dtype, channels: int, name: str) -> None:
    chain = chain_of(channels, backend, dtype, **OPTIONS[name])
    agree(chain, state_of(channels, dtype), 0.7, mask=torch.ones(D, dtype=dtype).index_fill_(0, torch.tensor([2]), 0))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each fused step whether it opened the next sublayer."""
    step, seen = rewriting.fused_step, []

    def watched(*given: Any, opens: bool, **others: Any) -> Any:
        seen.append(opens)
        return step(*given, opens=opens, **others)

    monkeypatch.setattr(rewriting, "fused_step", watched)
    return seen


def test_what_ends_a_crossing(opened: list[bool]) -> None:
    chain, state = chain_of(backend="fused"), state_of()

    def crossings() -> list[bool]:
        opened.clear()
        agree(chain, state)
        return opened[: len(opened) // 2]

    # Two residuals, a foreign module, three residuals, a foreign module.
    assert crossings() == [True, False, True, True, False]
    with chain[5].register_forward_hook(lambda module, args, output: output + 0.1):
        assert crossings() == [True, False, False, False, False]
    with chain[5].branch.register_forward_hook(lambda module, args, output: output + 0.1):
        assert crossings() == [True, False, True, True, False]
    with intervening(chain, {"5": Intervention(erase=False)}):
        assert crossings() == [True, False, True, False]
    with recording(chain, lambda name, record: None):
        assert crossings() == []
    assert crossings() == [True, False, True, True, False]


class LastRMSNorm(nn.Module):
    """RMSNorm as transformers' Llama has it; its class is known by its full name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.variance_epsilon = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


@pytest.mark.parametrize(
    ("norm", "dtype", "fuses"),
    [
        (lambda: nn.RMSNorm(D), torch.float64, True),
        (lambda: nn.RMSNorm(D, eps=1e-2), torch.float32, True),
        (LastRMSNorm, torch.float32, True),
        (LastRMSNorm, torch.float64, False),  # computes in fp32 then
        (lambda: nn.LayerNorm(D), torch.float64, False),
    ],
)
@pytest.mark.parametrize("channels", [1, 4])
def test_a_norm_of_the_network_itself(
    norm: Any, dtype: torch.dtype, fuses: bool, channels: int, opened: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(norms.SAME, f"{__name__}.LastRMSNorm", "variance_epsilon")
    stream = DeltaStream(D, channels, "delta", seed=1, norm="none")
    chain = stream.chain([stream.wrap(Branch(), norm=norm()) for _ in range(3)]).to(dtype)
    perturb(chain, size=0.1)
    use_backend(chain, "fused")
    agree(chain, state_of(channels, dtype))
    # Without a known norm there is still the compression to do, at V > 1.
    whole = fuses or channels > 1
    assert opened[:3] == [whole, whole, False]
    with chain[1].norm.register_forward_hook(lambda module, args, output: output + 0.1):
        opened.clear()
        agree(chain, state_of(channels, dtype))
        assert opened[:3] == [channels > 1, whole, False]


def test_a_second_norm_is_refused() -> None:
    with pytest.raises(UserError, match="norm='none'"):
        DeltaStream(D, 4).wrap(nn.Linear(D, D), norm=nn.RMSNorm(D))


@both_backends
def test_recorders_and_interventions_see_every_member(backend: str) -> None:
    chain, state, seen = chain_of(backend=backend), state_of(), []
    with recording(chain, lambda name, record: seen.append((name, record))):
        chain(state)
        one_by_one(chain, state)
    half = len(seen) // 2
    assert [name for name, _ in seen[:half]] == [name for name, _ in seen[half:]] == ["1", "2", "4", "5", "6"]
    for (_, one), (_, other) in zip(seen[:half], seen[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@both_backends
@pytest.mark.parametrize("plan", ["replay", "recover"])
def test_memory_plans(plan: str, backend: str) -> None:
    chain, state = chain_of(backend=backend), state_of()
    inputs = [state, *chain.parameters()]
    saved = gradients(chain(state), inputs)
    use_memory(chain, plan, every=2)
    for one, other in zip(gradients(chain(state), inputs), saved, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.0 if plan == "replay" else 1e-10)
    agree(chain, state)


def test_channel_first() -> None:
    stream = DeltaStream(D, 3, seed=1, channel_first=True, norm="none")
    chain = stream.chain([stream.wrap(nn.Conv2d(D, D, 3, padding=1)) for _ in range(3)]).double()
    state = randn(2, 3, D, 4, 5).requires_grad_()
    for backend in ("reference", "fused"):
        use_backend(chain, backend)
        agree(chain, state)


@both_backends
def test_compiled_without_a_graph_break(backend: str) -> None:
    chain, state = chain_of(backend=backend, dtype=torch.float32), state_of(dtype=torch.float32)
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    inputs = [state, *chain.parameters()]
    one, other = compiled(state, 0.5), chain(state, 0.5)
    for a, b in zip((one, *gradients(one, inputs)), (other, *gradients(other, inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_names_copies_and_members() -> None:
    stream = DeltaStream(D, 4, "delta", seed=1)
    first, second = stream.wrap(Branch()), stream.wrap(Branch())
    named = stream.chain({"first": first, "norm": nn.LayerNorm(D), "second": second})
    assert {key.split(".")[0] for key in named.state_dict()} == {"first", "norm", "second"}
    chain, state = chain_of(), state_of()
    twin = copy.deepcopy(chain)
    twin.load_state_dict(chain.state_dict())
    assert torch.equal(twin(state), chain(state))
    assert type(chain[1:3]) is Chain and len(chain) == 8
    assert stream.chain([])(state) is state
    # Chains within a chain are given the extra arguments too.
    nested = nn.Sequential(stream.chain([stream.chain([first, second]), first]))[0].double()
    torch.testing.assert_close(nested(state, 0.5), first(second(first(state, 0.5), 0.5), 0.5), rtol=0, atol=1e-12)


class Pair(Branch):
    def forward(self, c: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(c), c


def test_messages() -> None:
    stream, state = DeltaStream(D, 4, "delta", seed=1), state_of(dtype=torch.float32)
    with pytest.raises(
        UserError, match="a chain hands on one tensor, and Pair returned tuple; call the modules one by"
    ):
        stream.chain([stream.wrap(Pair()), stream.wrap(Branch())])(state)
    with pytest.raises(UserError, match="this residual wraps no branch"):
        stream.chain([stream.wrap()])
    with pytest.raises(UserError, match=r"= \(4, 6, False\), got '1' with \(3, 6, False\); reduce the state there"):
        stream.chain([stream.wrap(Branch()), DeltaStream(D, 3).wrap(Branch())])
    mixed = stream.chain([stream.wrap(Branch()), stream.wrap(Branch()).double()])
    with pytest.raises(UserError, match=r"the state must have the residual's dtype, torch\.float64, got"):
        mixed(state)

"""The state asked by key: the dense formula, its start, extremes, and that every way of running a network asks it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepdelta
from deepdelta import (
    GPT,
    PRESETS,
    DeltaStream,
    GPTConfig,
    ResidualConfig,
    UserError,
    param_groups,
    use_backend,
    use_memory,
)
from deepdelta.decoding import DecodingCache
from deepdelta.nn import DeltaResidual, Plan
from deepdelta.nn.parts.query import Query
from helpers import perturb, randn

pytestmark = pytest.mark.usefixtures("unchecked_file")
BACKENDS = ["reference", "fused"]


def query_of(channels: int = 3, dim: int = 5, seed: int = 1) -> Query:
    residual = DeltaStream(dim, channels, "delta", query=True, seed=seed).wrap()
    assert isinstance(residual.ask, Query)
    return residual.ask.double()


def dense(query: Query, state_VD: Tensor, c_D: Tensor) -> Tensor:
    """Of one token."""
    a = query.question.weight @ c_D
    return query.answer.weight @ (state_VD @ (a / torch.sqrt(a @ a + query.eps**2)))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_formula_in_value_and_gradient(channels: int) -> None:
    query = query_of(channels)
    perturb(query)
    state, c = randn(2, 4, channels, 5).requires_grad_(), randn(2, 4, 5, seed=1).requires_grad_()
    given = [state, c, query.question.weight, query.answer.weight]
    expected = torch.stack([dense(query, *one) for one in zip(state.flatten(0, 1), c.flatten(0, 1), strict=True)])
    actual, cotangent = query(state, c), randn(2, 4, 5, seed=2)
    torch.testing.assert_close(actual, expected.view(2, 4, 5), rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(out, given, cotangent.view(out.shape)) for out in (actual, expected)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert one.abs().sum() > 0


def test_a_key_of_nothing_asks_nothing_and_has_a_gradient() -> None:
    query = query_of()
    perturb(query)
    for scale in (0.0, 1e-300, 1e-30, 1e150):
        c = (scale * randn(4, 5)).requires_grad_()
        said = query(randn(4, 3, 5, seed=1), c)
        said.sum().backward()
        assert said.isfinite().all() and c.grad is not None and c.grad.isfinite().all(), scale
        assert scale > 1e-20 or said.abs().max() < 1e-10, scale


def test_what_was_written_under_a_key_is_read_under_it() -> None:
    """One rewrite with beta = 1 along k, and a query that asks for k, whatever was there before."""
    query, state, k, v = (
        query_of(),
        randn(7, 3, 5),
        nn.functional.normalize(randn(7, 5, seed=1), dim=-1),
        randn(7, 3, seed=2),
    )
    state = state + (v - (state @ k[..., None]).squeeze(-1))[..., None] * k[..., None, :]
    with torch.no_grad():
        query.question.weight.copy_(torch.eye(5))
        query.answer.weight.copy_(torch.eye(5)[:, :3])
    torch.testing.assert_close(query(state, k)[:, :3], v, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("preset", ["ddl", "paper-tc", "code-cc", "plain-start"])
def test_a_network_starts_as_without_it(preset: str) -> None:
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    models = [gpt(PRESETS[preset], query=query) for query in (False, True)]
    assert models[0](ids).logits.equal(models[1](ids).logits)
    weights = models[1].state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in models[0].state_dict().items())
    assert len(weights) == len(models[0].state_dict()) + 2 * 2 * 2
    assert "layers.1.mlp.ask.question.weight" in weights


def gpt(residual: ResidualConfig, *, query: bool, **changes: Any) -> GPT:
    residual = ResidualConfig(**{**vars(residual), "query": query})
    return GPT(GPTConfig(vocab_size=11, dim=12, heads=2, layers=2, context=8, residual=residual, **changes), seed=3)


@pytest.mark.parametrize("plan", ["save", "replay", "recover"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["paper-cc", "paper-tc", "plain-start", "code-cc"])
def test_a_chain_asks_as_residuals_one_by_one_do(preset: str, backend: Any, plan: Plan) -> None:
    """Values and all gradients, against the reference called one by one."""
    stream = DeltaStream(6, preset=preset, query=True, seed=2)
    chain = stream.chain([stream.wrap(nn.Linear(6, 6)) for _ in range(3)]).double()
    perturb(chain)
    state = randn(2, 5, 4, 6)

    def run(forward: Any) -> list[Tensor]:
        leaf = state.clone().requires_grad_()
        new = forward(leaf)
        return [new, *torch.autograd.grad(new, [leaf, *chain.parameters()], randn(*new.shape, seed=9))]

    def one_by_one(state: Tensor) -> Tensor:
        for residual in chain:
            state = residual(state)
        return state

    use_backend(chain, "reference")
    use_memory(chain, "save")
    expected = run(one_by_one)
    use_backend(chain, backend)
    use_memory(chain, plan)
    for way in (chain, one_by_one):
        for one, other in zip(run(way), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    asked = {name: parameter for name, parameter in chain.named_parameters() if ".ask." in name}
    assert len(asked) == 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["additive", "paper-cc", "paper-tc", "plain-start"])
def test_cached_decoding_asks_too(preset: str, backend: Any) -> None:
    model = gpt(PRESETS[preset], query=True)
    perturb(model)
    use_backend(model, backend)
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    cache = DecodingCache(model, 2)
    decoded = torch.cat([cache.decode(ids[:, :3]), *(cache.decode(ids[:, i : i + 1]) for i in range(3, 6))], 1)
    torch.testing.assert_close(decoded, model(ids).logits, rtol=2e-5, atol=2e-5)
    other = gpt(PRESETS[preset], query=False)
    other.load_state_dict({name: value for name, value in model.state_dict().items() if ".ask." not in name})
    assert not torch.allclose(other(ids).logits, decoded, atol=1e-3)


def test_it_asks_in_fp32_and_does_not_decay() -> None:
    """What the state says is the exact number, rounded once: sums of 512 products that cancel."""
    query = query_of(channels=3, dim=512).to(torch.bfloat16)
    state, c = randn(50, 3, 512).bfloat16(), randn(50, 512, seed=1).bfloat16()
    heard: list[Tensor] = []
    query.answer.register_forward_pre_hook(lambda module, given: heard.append(given[0]))
    query(state, c)
    asked = c.double() @ query.question.weight.double().T
    q = asked / (asked.square().sum(-1, keepdim=True) + query.eps**2).sqrt()
    exact = (state.double() @ q[..., None]).squeeze(-1)
    assert heard[0].dtype == torch.bfloat16
    assert ((heard[0].double() - exact).abs() <= 2.0**-8 * exact.abs()).all()
    residual = DeltaStream(5, 3, "delta", query=True).wrap(nn.Linear(5, 5))
    exempt = {id(parameter) for parameter in param_groups(residual, 0.1)[2]["params"]}
    assert {id(parameter) for parameter in residual.ask.parameters()} <= exempt  # type: ignore[union-attr]


def test_of_a_narrow_state_no_wide_copy_is_kept() -> None:
    query, kept = query_of(channels=16, dim=32).to(torch.bfloat16), list[Tensor]()
    perturb(query)
    state, c = randn(40, 16, 32).bfloat16().requires_grad_(), randn(40, 32, seed=1).bfloat16().requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        said = query(state, c)
    assert any(tensor is state for tensor in kept)
    assert sum(tensor.nbytes for tensor in kept if tensor is not state) < state.nbytes
    cotangent = randn(40, 32, seed=2)
    found = torch.autograd.grad(said, (state, c), cotangent.bfloat16())
    exact = [tensor.detach().double().requires_grad_() for tensor in (state, c)]
    expected = torch.autograd.grad(query.double()(*exact), exact, cotangent)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


def test_a_norm_of_the_network_s_own() -> None:
    """Given to `open` or to `wrap`, it is the one before the query."""
    stream, norm = DeltaStream(6, 4, "delta", query=True, norm="none", seed=1), nn.LayerNorm(6).double()
    own, other = stream.wrap(norm=norm).double(), stream.wrap().double()
    perturb(other)
    own.load_state_dict(other.state_dict() | {f"norm.{name}": value for name, value in norm.state_dict().items()})
    state = randn(3, 4, 6)
    torch.testing.assert_close(other.open(state, norm)[0], own.open(state)[0])


def test_a_gpt_that_asks_is_not_retrofitted() -> None:
    with pytest.raises(UserError, match="retrofit takes a GPT with query=False"):
        deepdelta.retrofit(gpt(PRESETS["additive"], query=True), value_channels=4)


def test_channel_first_and_by_hand() -> None:
    stream = DeltaStream(6, 4, "delta", query=True, channel_first=True, seed=1)
    flat = DeltaStream(6, 4, "delta", query=True, seed=1)
    first, last = (one.wrap(nn.Identity()).double() for one in (stream, flat))
    perturb(last)
    first.load_state_dict(last.state_dict())
    state = randn(2, 4, 6, 3, 5)
    c, rewrite = first.open(state)
    c_last, rewrite_last = last.open(state.movedim(2, -1).movedim(1, -2))
    torch.testing.assert_close(c.movedim(1, -1), c_last)
    torch.testing.assert_close(rewrite(c).movedim(2, -1).movedim(1, -2), rewrite_last(c_last))
    assert isinstance(first, DeltaResidual)


def test_the_authors_format_has_no_query() -> None:
    from deepdelta.interop.published import _check_published

    with pytest.raises(UserError, match="the published code has no query=True"):
        _check_published(
            GPTConfig(vocab_size=11, residual=ResidualConfig(**{**vars(PRESETS["code-cc"]), "query": True}))
        )

"""The stream that users meet: expand, wrap, reduce, the manual form, what passes through, who owns what."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepdelta import DeltaResidual, DeltaStream, ResidualConfig, UserError, use_backend
from helpers import gradients, near, perturb, randn

D, V = 6, 3
RULES = ["delta", "write_only", "erase_only", "additive", "additive_erase", "two_gate"]


class Branch(nn.Module):
    """A branch with extra arguments and auxiliary outputs, as attention modules have them."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, c: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> tuple[Tensor, str, Tensor]:
        h = scale * self.map(c)
        return (h if mask is None else h * mask), "weights", c


class Network(nn.Module):
    """What a user writes: a stream, blocks wrapped by it, one of them sharing its compression."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stream = DeltaStream(D, seed=0, **vars(ResidualConfig(**{"value_channels": V} | options)))
        first = self.stream.wrap(nn.Linear(D, D))
        self.blocks = nn.ModuleList([first, self.stream.wrap(nn.Linear(D, D), share_compression=first)])

    def forward(self, x: Tensor) -> Tensor:
        state = self.stream.expand(x)
        for block in self.blocks:
            state = block(state)
        return self.stream.reduce(state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("channels", [1, V])
def test_the_manual_form_is_the_wrapped_form(rule, channels):
    stream = DeltaStream(D, channels, rule=rule, seed=0)
    branch = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))
    wrapped, manual = stream.wrap(branch), stream.wrap()
    manual.load_state_dict({k: v for k, v in wrapped.state_dict().items() if not k.startswith("branch.")})
    state = stream.expand(randn(2, 5, D).float()).clone().requires_grad_()
    branch_input, rewrite = manual.open(state)
    near(rewrite(branch(branch_input)), wrapped(state), 0)
    own = [p for name, p in wrapped.named_parameters() if not name.startswith("branch.")]
    one = gradients(rewrite(branch(branch_input)), [state, *branch.parameters(), *manual.parameters()])
    two = gradients(wrapped(state), [state, *branch.parameters(), *own])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_arguments_and_auxiliary_outputs_pass_through():
    branch, state = Branch(), randn(4, V, D).float()
    residual = DeltaStream(D, V, seed=0).wrap(branch)
    mask = (randn(4, D) > 0).float()
    new, name, seen = residual(state, 0.5, mask=mask)
    c, rewrite = residual.open(state)
    assert name == "weights" and torch.equal(seen, c)
    assert torch.equal(new, rewrite(0.5 * branch.map(c) * mask))


def test_a_branch_whose_tuple_has_names():
    class Output(NamedTuple):
        hidden: Tensor
        count: int

    class Named(nn.Module):
        def forward(self, c: Tensor) -> Output:
            return Output(torch.sin(c), 3)

    state = randn(4, V, D).float()
    residual = DeltaStream(D, V, seed=0).wrap(Named())
    new, count = residual(state)
    c, rewrite = residual.open(state)
    assert count == 3 and torch.equal(new, rewrite(torch.sin(c)))


@pytest.mark.parametrize("module", [nn.Identity(), nn.Linear(D, D), nn.MultiheadAttention(D, 2, batch_first=True)])
def test_any_module_can_be_a_branch(module):
    stream = DeltaStream(D, V, seed=0)
    residual, state = stream.wrap(module), stream.expand(randn(2, 5, D).float())
    if isinstance(module, nn.MultiheadAttention):
        c, rewrite = residual.open(state)
        new, _ = c, rewrite(module(c, c, c, need_weights=False)[0])
        assert not torch.equal(rewrite(module(c, c, c)[0]), state)
    else:
        new = residual(state)
        assert new.shape == state.shape


def test_one_value_channel_keeps_the_state_as_it_is():
    stream = DeltaStream(D, 1)
    x = randn(2, 5, D).float()
    assert stream.expand(x).shape == (2, 5, 1, D)
    assert torch.equal(stream.reduce(stream.expand(x)), x)
    assert list(stream.parameters()) == []


def test_additive_is_the_plain_residual():
    stream = DeltaStream(D, 1, rule="additive", seed=0)
    blocks = [nn.Linear(D, D), nn.Sequential(nn.Linear(D, D), nn.Tanh())]
    x = randn(3, D).float()
    state, plain = stream.expand(x), x
    for block in blocks:
        state = stream.wrap(block)(state)
        plain = plain + block(nn.functional.rms_norm(plain, (D,), eps=1e-5))
    assert torch.equal(stream.reduce(state), plain)


def test_the_stream_never_owns_what_it_wrapped():
    stream = DeltaStream(D, V, seed=0)
    before = list(stream.state_dict())
    branch = nn.Linear(D, D)
    stream.wrap(branch)
    assert list(stream.state_dict()) == before == ["readout.weight"]
    assert not any(module is branch for module in stream.modules())


def test_every_key_appears_once():
    network = Network(compression="token")
    tensors = network.state_dict()
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    assert len(set(pointers)) == len(pointers)
    assert "blocks.0.compression.weight" in tensors
    assert not any(name.startswith("blocks.1.") and "compression" in name for name in tensors)
    assert len(list(network.parameters())) == len(tensors)


def test_sharing_a_compression_is_using_the_same_one():
    network = Network(compression="token", norm="none")
    first, second = network.blocks
    state = randn(2, 5, V, D).float()
    perturb(network)
    assert torch.equal(first.open(state)[0], second.open(state)[0])
    second.open(state)[0].sum().backward()
    assert first.compression.weight.grad.any()
    third = network.stream.wrap(share_compression=second)  # of one that itself shares
    assert torch.equal(third.open(state)[0], first.open(state)[0])
    assert not any("compression" in name for name, _ in third.named_parameters())


def test_a_compression_of_another_stream_is_refused():
    other = DeltaStream(D + 1, 2).wrap()
    with pytest.raises(UserError, match="share_compression"):
        DeltaStream(D, V).wrap(share_compression=other)


@pytest.mark.parametrize(
    "options", [{}, {"compression": "token", "expansion": "embedding_conv"}, {"rule": "delta", "rank": 2}]
)
def test_deepcopy_and_save_and_load(tmp_path, options):
    network = Network(**options)
    perturb(network)
    x = randn(2, 5, D).float()
    expected = network(x)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)  # nothing is shared with the original, the compression neither
    save_file(twin.state_dict(), tmp_path / "weights.safetensors")
    fresh = Network(**options)
    fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(fresh(x), expected)


def test_channel_first_is_channel_last_permuted():
    images = randn(2, D, 4, 3).float()
    first, last = DeltaStream(D, V, channel_first=True, seed=0), DeltaStream(D, V, seed=0)
    convolution = nn.Conv2d(D, D, 1)
    one, two = first.wrap(convolution), last.wrap()
    state, state_last = first.expand(images), last.expand(images.permute(0, 2, 3, 1))
    assert state.shape == (2, V, D, 4, 3)
    state = one(state)
    c, rewrite = two.open(state_last)
    new_last = rewrite(convolution(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    near(state, new_last.permute(0, 3, 4, 1, 2), 1e-6)
    near(first.reduce(state), last.reduce(new_last).permute(0, 3, 1, 2), 1e-6)


def manual(**options: Any) -> DeltaResidual:
    return DeltaStream(D, V, seed=0, **{"rule": "delta"} | options).wrap()


ERRORS = [
    (lambda: DeltaStream(D, V).expand(torch.zeros(2, D + 1)), "x must end in the stream's width 6, got shape (2, 7)"),
    (lambda: DeltaStream(D, V).expand(torch.zeros(())), "x must end in the stream's width 6, got shape ()"),
    (lambda: DeltaStream(D, V).reduce(torch.zeros(2, D)), "(value channels, width) = (3, 6), got shape (2, 6)"),
    (lambda: manual().open(torch.zeros(2, 4, D)), "(value channels, width) = (3, 6), got shape (2, 4, 6)"),
    (lambda: manual().open(torch.zeros(D)), "(value channels, width) = (3, 6), got shape (6,)"),
    (lambda: manual().open(torch.zeros(2, V, D))[1](torch.zeros(3, D)), "(2, 6), got (3, 6)"),
    (lambda: manual().open(torch.zeros(2, V, D))[1](torch.zeros(2, D + 1)), "(2, 6), got (2, 7)"),
    (lambda: manual()(torch.zeros(2, V, D)), "this residual wraps no branch: use `c, rewrite = residual.open(state)`"),
    (
        lambda: DeltaStream(D, V, expansion="embedding_conv").expand(torch.zeros(D)),
        "works over a token axis: (..., token, width) is needed, got shape (6,)",
    ),
    (lambda: DeltaStream(D, V, compression="token").reduce(torch.zeros(V, D)), "works over a token axis"),
    (lambda: manual(compression="token").open(torch.zeros(V, D)), "works over a token axis"),
    (lambda: DeltaStream(D, V, channel_first=True, compression="token"), "channel_first=True has no token axis"),
    (lambda: DeltaStream(D, V).wrap(nn.TransformerEncoderLayer(D, 2)), "adds its input itself"),
    (lambda: DeltaStream(D, V).wrap(manual()), "adds its input itself"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[f"case{i}" for i in range(len(ERRORS))])
def test_messages(unchecked, call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)


def test_half_precision_state_under_autocast_and_fp32_gates(gate_dtypes):
    """bf16 autocast on the CPU: the branch runs in bf16, gate logits and the state do not."""
    stream = DeltaStream(D, V, rule="delta", seed=0)
    branch = nn.Linear(D, D)
    residual, x = stream.wrap(branch), randn(4, D).float()
    dtypes: dict[str, torch.dtype] = {}
    branch.register_forward_hook(lambda module, args, out: dtypes.update(branch=out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = residual(stream.expand(x))
        reduced = stream.reduce(state)
    assert gate_dtypes == {torch.float32} and dtypes == {"branch": torch.bfloat16}
    assert (state.dtype, reduced.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("rule", ["delta", "erase_only", "additive_erase"])
def test_identity_limit_under_autocast(rule):
    """A closed gate leaves an fp32 state bit for bit as it was, whatever autocast does to the branch."""
    options = {"gate": "constant", "gate_init": 0.0, "erase_init": 0.0}
    config = ResidualConfig(rule=rule, value_channels=V, **options)
    residual, state = DeltaStream(D, seed=0, **vars(config)).wrap(nn.Identity()), randn(4, V, D).float()
    if rule == "additive_erase":
        c, rewrite = residual.open(state)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(rewrite(torch.zeros_like(c)), state)
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(residual(state), state)


@pytest.mark.parametrize("expansion", ["repeat", "embedding_conv"])
@pytest.mark.parametrize("compression", ["channel", "channel_conv", "token"])
def test_every_part_keeps_the_state_in_fp32_under_autocast(expansion, compression):
    """Or two conditions would differ in the precision of their residual stream too."""
    stream = DeltaStream(D, 4, seed=0, expansion=expansion, compression=compression)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = stream.expand(randn(2, 5, D).float())
        assert state.dtype == torch.float32
        assert stream.wrap(nn.Linear(D, D))(state).dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("expansion", ["repeat", "embedding_conv"])
@pytest.mark.parametrize("compression", ["channel", "channel_conv", "token"])
def test_of_nothing_comes_nothing_of_the_right_shape(backend, expansion, compression):
    """Without tokens and without rows: the shapes of every step, and zero gradients for every parameter."""
    for shape in ((0, 5), (2, 0), (0, 0), (3, 0, 2), (3, 2, 0), (0,)):
        network = Network(expansion=expansion, compression=compression, compression_kernel=2)
        use_backend(network, backend)
        x = torch.zeros(*shape, D, requires_grad=True)
        state = network.blocks[0](network.stream.expand(x))
        assert state.shape == (*shape, V, D)
        result = network(x)
        assert result.shape == x.shape
        result.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


def test_one_argument_makes_the_plain_residual():
    stream = DeltaStream(6, rule="additive", norm="none")
    branch = nn.Linear(6, 6)
    x = torch.randn(3, 6)
    assert stream.config.value_channels == 1
    assert torch.equal(stream.reduce(stream.wrap(branch)(stream.expand(x))), x + branch(x))
    assert DeltaStream(6).config.value_channels == 4
    assert DeltaStream(6, 4, rule="additive").config.value_channels == 4


def test_a_state_of_another_dtype_or_device_is_named():
    block = DeltaStream(6).wrap(nn.Linear(6, 6))
    with pytest.raises(UserError, match=r"the residual's dtype, torch\.float32, got torch\.float64; convert"):
        block.open(torch.zeros(3, 4, 6, dtype=torch.float64))
    with pytest.raises(UserError, match=r"the residual's device, cpu, got meta; move"):
        block.open(torch.zeros(3, 4, 6, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(torch.zeros(3, 4, 6)).dtype == torch.float32


@pytest.mark.parametrize("compression", ["channel", "channel_conv", "token"])
def test_vectors_and_states_of_another_dtype_or_device_are_named_by_the_stream(compression):
    stream = DeltaStream(6, 4, expansion="embedding_conv", compression=compression)
    for call, name, shape in ((stream.expand, "x", (2, 3, 6)), (stream.reduce, "the state", (2, 3, 4, 6))):
        with pytest.raises(
            UserError, match=rf"^{name} must have the stream's dtype, torch\.float32, got torch\.float64"
        ):
            call(torch.zeros(shape, dtype=torch.float64))
        with pytest.raises(UserError, match=rf"^{name} must be on the stream's device, cpu, got meta; move"):
            call(torch.zeros(shape, device="meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert call(torch.zeros(shape, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert DeltaStream(6).expand(torch.zeros(6, dtype=torch.float64)).dtype == torch.float64  # it has no parameters


def test_a_branch_output_that_is_no_tensor_or_elsewhere_is_named(unchecked):
    class Returning(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def forward(self, c: Tensor) -> Any:
            return self.value

    stream, state = DeltaStream(D, V), torch.zeros(2, V, D)
    for value, kind in (({"h": "text"}, "str"), ([], "NoneType"), ((None, 1), "NoneType"), ({1}, "set")):
        with pytest.raises(UserError, match=f"tensor, or a tuple, list or dictionary that starts with one, got {kind}"):
            stream.wrap(Returning(value))(state)
    with pytest.raises(UserError, match="output on the device of its input, cpu, got meta; move it"):
        stream.wrap(Returning(torch.zeros(2, D, device="meta")))(state)

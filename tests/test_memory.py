"""What is saved of the state: gradients under each plan, and the memory that a step takes."""

import gc
import io
import weakref

import pytest
import torch
from torch import Tensor, nn

from deepdelta import GPT, PRESETS, DeltaStream, GPTConfig, ResidualConfig, UserError, use_backend, use_memory
from deepdelta.lab.measure.memory import peak_bytes
from deepdelta.nn.activation_memory import SavedState
from helpers import randn

VARIANTS = {
    **{name: PRESETS[name] for name in ("additive", "paper-cc", "paper-scalar", "paper-tc", "paper-v1", "code-cc")},
    "additive_erase": ResidualConfig(rule="additive_erase"),
    "rank 3": ResidualConfig(rank=3),
    "blocks": ResidualConfig(rule="additive_erase", erase_blocks=3),
}


def gradients(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    assert loss is not None
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("name", VARIANTS)
def test_replay_is_bit_equal_and_recovery_close(name: str, backend: str, unchecked: None) -> None:
    ids = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(0))
    model = GPT(GPTConfig(vocab_size=97, dim=12, heads=2, layers=5, context=12, residual=VARIANTS[name]), seed=3)
    use_backend(model, backend)
    saved = gradients(model, ids)
    for every in (1, 3, 100):
        use_memory(model, "replay", every)
        replayed = gradients(model, ids)
        assert saved.keys() == replayed.keys()
        for parameter, gradient in saved.items():
            assert torch.equal(gradient, replayed[parameter]), parameter
    use_memory(model, "recover")
    for parameter, gradient in gradients(model, ids).items():
        error = (gradient - saved[parameter]).abs().max() / saved[parameter].abs().max()
        assert error < 2e-3, (parameter, error)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("channel_first", [False, True])
def test_around_any_branch(channel_first: bool, backend: str, unchecked: None) -> None:
    """Branches, shared compressions, operations of the user's own in between, and a second backward pass."""
    stream = DeltaStream(6, 3, seed=1, channel_first=channel_first, norm="none", rule="delta")
    branch = (lambda: nn.Conv1d(6, 6, 1)) if channel_first else (lambda: nn.Linear(6, 6))
    torch.manual_seed(0)
    blocks = nn.ModuleList()
    for index in range(4):
        blocks.append(stream.wrap(branch(), share_compression=blocks[index - 1] if index % 2 else None))
    use_backend(blocks, backend)
    x = randn(2, 6, 5).float() if channel_first else randn(2, 5, 6).float()

    def run() -> list[Tensor]:
        blocks.zero_grad()
        given = x.clone().requires_grad_()
        state = stream.expand(given)
        for index, block in enumerate(blocks):
            state = block(state)
            if index == 1:
                state = torch.relu(state)
        loss = stream.reduce(state).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert given.grad is not None
        return [given.grad, *(p.grad for p in blocks.parameters() if p.grad is not None)]

    saved = run()
    for plan, tolerance in (("replay", 0.0), ("recover", 1e-4)):
        use_memory(blocks, plan, every=2)
        for one, other in zip(saved, run(), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))


def test_a_state_changed_in_place_is_never_used_as_it_was(unchecked: None) -> None:
    stream = DeltaStream(6, 3, seed=1, rule="delta")
    blocks = nn.ModuleList(stream.wrap(nn.Linear(6, 6)) for _ in range(3))
    x = randn(4, 6).float()

    def run(in_place: bool) -> list[Tensor]:
        blocks.zero_grad()
        state = blocks[0](stream.expand(x))
        state = state.mul_(2.0) if in_place else state * 2.0
        stream.reduce(blocks[2](blocks[1](state))).square().sum().backward()
        return [p.grad.clone() for p in blocks.parameters() if p.grad is not None]

    expected = run(False)
    use_memory(blocks, "replay", every=100)
    for one, other in zip(expected, run(True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("plan", ["replay", "recover"])
def test_a_state_is_the_user_s_own_tensor(plan: str, backend: str, unchecked: None) -> None:
    """It is written as under the plan save, and neither it nor its graph outlives what the user holds of it."""
    stream = DeltaStream(6, 3, seed=1, rule="delta")
    torch.manual_seed(0)
    blocks = nn.ModuleList(stream.wrap(nn.Linear(6, 6)) for _ in range(4))
    use_backend(blocks, backend)

    def states(chosen: str) -> list[Tensor]:
        use_memory(blocks, chosen, every=2)
        found = [stream.expand(randn(4, 6).float()).clone().requires_grad_()]
        for block in blocks:
            found.append(block(found[-1]))
        return found

    def written(tensors: list[Tensor]) -> bytes:
        file = io.BytesIO()
        torch.save(tensors, file)
        return file.getvalue()

    made = states(plan)
    assert written(made) == written(states("save"))
    assert all(vars(state) == {} for state in made)
    loaded = torch.load(io.BytesIO(written(made)), weights_only=True)
    assert all(torch.equal(one, other) for one, other in zip(loaded, made, strict=True))
    # No backward pass has freed what was saved.
    alive = [weakref.ref(state) for state in made]
    del made
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("plan", ["replay", "recover"])
def test_a_graph_whose_backward_pass_is_done_holds_no_state(plan: str, unchecked: None) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(one) is SavedState for one in gc.get_objects())

    stream, before = DeltaStream(6, 3, seed=1, rule="delta"), alive()
    blocks = nn.Sequential(*(stream.wrap(nn.Linear(6, 6)) for _ in range(4)))
    use_memory(blocks, plan, every=2)
    loss = stream.reduce(blocks(stream.expand(randn(4, 6).float()))).square().sum()
    assert alive() > before
    loss.backward()
    assert alive() == before and loss.grad_fn is not None


def test_memory_of_a_deep_model_grows_like_the_additive_one(unchecked: None) -> None:
    ids = torch.randint(97, (2, 65), generator=torch.Generator().manual_seed(0))

    def peak(preset: str, layers: int, plan: str, backend: str) -> int:
        sizes = {"vocab_size": 97, "dim": 64, "heads": 2, "context": 64}
        model = GPT(GPTConfig(layers=layers, residual=PRESETS[preset], **sizes))
        use_backend(model, backend)
        use_memory(model, plan)
        gradients(model, ids)
        return peak_bytes(lambda: gradients(model, ids), list(model.parameters()))

    def slope(preset: str, plan: str, backend: str) -> int:
        return peak(preset, 24, plan, backend) - peak(preset, 8, plan, backend)

    additive = slope("additive", "save", "reference")
    assert slope("paper-cc", "replay", "fused") < 1.1 * additive
    assert slope("paper-cc", "save", "fused") > 1.15 * additive
    # The reference saves more within a residual, but of the states as little.
    states = 8 * 2 * 2 * 64 * 4 * 64 * 4  # layers, residuals, rows, tokens, V, D, bytes
    saved, *others = (peak("paper-cc", 8, plan, "reference") for plan in ("save", "replay", "recover"))
    # Half of them are there when the backward pass begins: every eighth, and the last eight made again.
    assert all(other < saved - 0.3 * states for other in others)


def test_refusals(unchecked: None) -> None:
    block = DeltaStream(4, rule="delta").wrap(nn.Linear(4, 4))
    with pytest.raises(UserError, match="there is no memory plan 'replya'; did you mean 'replay'"):
        use_memory(block, "replya")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="every must be at least 1, got 0"):
        use_memory(block, "replay", 0)

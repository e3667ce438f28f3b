"""What everyday use leans on: what branches return, readouts, nn.Sequential, batches of prompts, rows of training."""

import copy
import io
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from deepdelta import GPT, PRESETS, DeltaStream, GPTConfig, UserError, generate, generate_batch, use_backend
from deepdelta.models import GPTOutput
from helpers import near, perturb, randn
from tiny_runs import config, quietly, rows, text_file

D, V = 6, 3


class Pair(NamedTuple):
    h: Tensor
    note: str


class Returning(nn.Module):
    """A branch that returns its output within something else."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(D, D).double(), kind

    def forward(self, c: Tensor) -> Any:
        return self.kind(self.inner(c))


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (lambda h: (h, "note"), lambda out: (out[0], out[1])),
        (lambda h: [h, "note"], lambda out: (out[0], out[1])),
        (lambda h: {"h": h, "note": "note"}, lambda out: (out["h"], out["note"])),
        (lambda h: Pair(h, "note"), lambda out: (out.h, out.note)),
    ],
    ids=["tuple", "list", "dict", "named tuple"],
)
def test_what_a_branch_returns_comes_back_with_the_state_in_its_place(kind, read):
    stream = DeltaStream(D, V, seed=1).double()
    residual, state = stream.wrap(Returning(kind)).double(), randn(2, 5, V, D)
    output = residual(state)
    assert type(output) is type(kind(state))
    rewritten, note = read(output)
    residual.branch.kind = lambda h: h
    assert note == "note" and rewritten.equal(residual(state))


def test_outputs_of_transformers_come_back_as_they_are():
    from transformers.modeling_outputs import BaseModelOutput

    stream = DeltaStream(D, V, seed=1).double()
    branch = Returning(lambda h: BaseModelOutput(last_hidden_state=h, hidden_states=(h,)))
    residual, state = stream.wrap(branch).double(), randn(2, 5, V, D)
    output = residual(state)
    branch.kind = lambda h: h
    assert isinstance(output, BaseModelOutput) and output.last_hidden_state.equal(residual(state))
    assert output[0] is output.last_hidden_state and output.hidden_states[0].shape == (2, 5, D)


@pytest.mark.parametrize("compression", ["channel", "token"])
def test_expansion_and_readout_stand_in_a_sequential(compression):
    stream = DeltaStream(D, V, seed=1, expansion="embedding_conv", compression=compression)
    blocks = [stream.wrap(nn.Linear(D, D)) for _ in range(2)]
    network = nn.Sequential(stream.expansion, *blocks, stream.readout)
    perturb(network)
    x = randn(2, 4, D).float()
    assert network(x).equal(stream.reduce(blocks[1](blocks[0](stream.expand(x)))))
    network(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in stream.parameters())
    assert set(stream.parameters()) < set(network.parameters())


def stepped(stream: DeltaStream, parameters: list[nn.Parameter]) -> None:
    """Two steps of SGD over these parameters, the state read by the stream."""
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    blocks = stream.wrap(nn.Linear(D, D))
    optimizer.add_param_group({"params": [*blocks.parameters()]})
    for _ in range(2):
        stream.reduce(blocks(stream.expand(torch.ones(2, D)))).sum().backward()
        optimizer.step()


def test_a_stream_that_no_optimiser_has_is_warned_of_once():
    own = [nn.Parameter(torch.zeros(1))]
    with pytest.warns(UserWarning, match="not its readout and expansion, which stay") as told:
        stepped(DeltaStream(D, V, seed=0), own)
    assert len(told) == 1
    # Where it is trained, frozen on purpose or has nothing to train, nothing is said: warnings are errors here.
    trained = DeltaStream(D, V, seed=0)
    stepped(trained, [*trained.parameters()])
    stepped(DeltaStream(D, V, seed=0).requires_grad_(False), own)
    stepped(DeltaStream(D, V, seed=0, reduce="sum"), own)


@pytest.mark.parametrize("options", [{}, {"reduce": "sum"}, {"compression": "channel_conv"}, {"value_channels": 1}])
def test_a_convolutional_network_is_a_sequential_too(options):
    stream = DeltaStream(D, channel_first=True, seed=0, **options)
    blocks = [stream.wrap(nn.Conv2d(D, D, 3, padding=1)) for _ in range(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, 5)]
    network = nn.Sequential(nn.Conv2d(3, D, 3), stream.expansion, *blocks, stream.readout, *head)
    perturb(network)
    images = randn(2, 3, 6, 5).float()
    state = stream.expand(network[0](images))
    for block in blocks:
        state = block(state)
    expected = stream.reduce(state)
    for part in head:
        expected = part(expected)
    near(network(images), expected, 1e-6)
    near(copy.deepcopy(network)(images), expected, 1e-6)
    near(torch.export.export(network, (images,)).module()(images), expected, 1e-5)
    last = DeltaStream(D, seed=0, **options)
    assert stream.state_dict().keys() == last.state_dict().keys()
    again = pickle.loads(pickle.dumps(network))  # the hooks of both ends go along
    near(again(images), expected, 1e-6)
    network(images).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_readouts_without_parameters():
    state = randn(2, 4, V, D)
    for kind, expected in (("sum", state[:, :, 0] + state[:, :, 1] + state[:, :, 2]), ("mean", state.mean(2))):
        stream = DeltaStream(D, V, reduce=kind)
        near(stream.reduce(state), expected)
        assert not list(stream.readout.parameters()) and "sum" not in DeltaStream(D, V).readout.extra_repr()
    first = DeltaStream(D, V, channel_first=True, reduce="sum")
    near(first.reduce(randn(2, V, D, 5)), randn(2, V, D, 5).sum(1))
    learned = DeltaStream(D, V, rule="delta", seed=0).double()
    near(learned.reduce(state), state.mean(2), 1e-6)


def small(preset: str = "paper-tc", layers: int = 2) -> GPT:
    sizes = {"vocab_size": 11, "dim": 10, "heads": 2, "head_dim": 6, "layers": layers, "context": 9}
    model = GPT(GPTConfig(**sizes, residual=PRESETS[preset]), seed=3).double()
    perturb(model)
    use_backend(model, "reference")
    return model


PROMPTS = [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 1, 2]]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}], ids=str)
def test_a_row_of_a_batch_is_what_it_is_alone(options):
    model = small()
    # Past the context, too: there the window slides.
    steps = list(generate_batch(model, PROMPTS, tokens=8, seed=4, **options))
    for i, prompt in enumerate(PROMPTS):
        assert [step[i] for step in steps] == list(generate(model, prompt, tokens=8, seed=4 + i, **options))


def test_batches_come_as_tensors_and_prompts_as_they_are():
    model, ids = small(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = list(generate_batch(model, ids.tolist(), tokens=3, temperature=0.0))
    assert list(generate_batch(model, ids, tokens=3, temperature=0.0)) == expected
    assert list(generate_batch(model, ids.numpy(), tokens=3, temperature=0.0)) == expected
    assert list(generate(model, ids[:1], tokens=3, temperature=0.0)) == [step[0] for step in expected]


def test_stop_tokens_end_a_row():
    model = small()
    free = [list(generate(model, prompt, tokens=12, temperature=0.0)) for prompt in PROMPTS]
    stop = {free[0][2], free[2][1]}
    until = [next((i + 1 for i, one in enumerate(ids) if one in stop), 12) for ids in free]
    assert [list(generate(model, prompt, tokens=12, temperature=0.0, stop=[*stop])) for prompt in PROMPTS] == [
        ids[:end] for ids, end in zip(free, until, strict=True)
    ]
    steps = list(generate_batch(model, PROMPTS, tokens=12, temperature=0.0, stop=[*stop]))
    assert len(steps) == max(until)
    for i, (ids, end) in enumerate(zip(free, until, strict=True)):
        assert [step[i] for step in steps] == ids[:end] + [None] * (len(steps) - end)


def test_top_p_draws_from_the_fewest_that_reach_it():
    model, prompt = small(), [1, 2, 3]
    with torch.no_grad():
        shares = model(torch.tensor([prompt])).logits[0, -1].softmax(0)
    ordered = shares.sort(descending=True)
    top_p = float(ordered.values[:3].sum()) - 1e-6
    drawn = {next(generate(model, prompt, tokens=1, top_p=top_p, seed=seed)) for seed in range(60)}
    assert drawn == set(ordered.indices[:3].tolist())
    assert {next(generate(model, prompt, tokens=1, top_p=1e-9, seed=seed)) for seed in range(9)} == {
        int(shares.argmax())
    }


def test_refusals(unchecked):
    model = small()
    with pytest.raises(UserError, match="there is no reduce='average'; known are: learned, mean, sum"):
        DeltaStream(D, V, reduce="average")  # type: ignore[arg-type]
    for top_p in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"top_p must lie in \(0, 1\], got"):
            generate(model, [1], tokens=1, top_p=top_p)
    with pytest.raises(UserError, match="prompts must hold at least one prompt"):
        generate_batch(model, [], tokens=1)
    with pytest.raises(UserError, match="the prompt must hold at least one token"):
        generate_batch(model, [[1], []], tokens=1)


def test_an_exported_program_returns_the_output_it_had(unchecked):
    model, ids = small("paper-scalar", 1).float(), torch.tensor([[1, 2, 3]])
    written = io.BytesIO()
    torch.export.save(torch.export.export(model, (ids,)), written)
    written.seek(0)
    output = torch.export.load(written).module()(ids)
    assert isinstance(output, GPTOutput) and output.loss is None
    torch.testing.assert_close(output.logits, model(ids).logits)


def test_training_hands_every_row_on_and_takes_paths_as_text(tmp_path):
    seen: list[dict[str, Any]] = []
    run = str(tmp_path / "run")
    quietly(config(text_file(tmp_path / "text.txt"), steps=4, warmup=1), run, on_row=lambda row: seen.append(dict(row)))
    written = rows(tmp_path / "run")
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in seen] == written and len(written) > 4

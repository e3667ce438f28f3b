"""torch.compile of a whole GPT, traced as one graph: values, gradients, and what recording adds to the graph.

The backend is aot_eager or one of our own: both need no C++ compiler.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, RewriteRecord, recording
from helpers import perturb

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(residual: ResidualConfig, layers: int = 1) -> GPT:
    model = GPT(GPTConfig(vocab_size=11, dim=12, heads=2, layers=layers, context=8, residual=residual))
    perturb(model)
    return model


IDS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))


def step(run: Callable[..., Any], model: GPT) -> list[Tensor]:
    model.zero_grad()
    output = run(IDS, LABELS)
    output.loss.backward()
    return [output.logits.detach(), output.loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    "residual",
    [
        PRESETS["paper-cc"],
        PRESETS["additive"],
        ResidualConfig(target="affine"),
        ResidualConfig(rule="channels"),
        ResidualConfig(compression="token", rule="two_gate", compression_sharing="block"),
        ResidualConfig(direction="pooled", target="branch", direction_pool="attention", rank=2, gate="two_layer"),
    ],
    ids=["paper-cc", "additive", "affine", "channels", "token-two_gate-shared", "pooled-rank2"],
)
def test_compiled_equals_eager_in_values_and_gradients(residual):
    model = model_of(residual)
    eager = step(model, model)
    compiled = step(torch.compile(model, backend="aot_eager", fullgraph=True), model)
    for one, two in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


class Graphs:
    """A backend that runs each graph as it is and keeps what it saw: the operations and the outputs."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], int]] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nodes = list(graph.graph.nodes)
        operations = [str(node.target) for node in nodes if node.op.startswith("call")]
        self.seen.append((operations, len(nodes[-1].args[0])))
        return graph.forward


def test_recording_under_compile():
    """Off, the graph is that of a model never recorded; on, the records are those of eager, and no graph is made
    twice however often recording is entered."""
    model = model_of(PRESETS["paper-cc"])
    never = Graphs()
    torch.compile(model, backend=never, fullgraph=True)(IDS)
    torch._dynamo.reset()

    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    runs = []
    for run in (model, compiled, model, compiled, compiled):
        records: list[tuple[str, RewriteRecord]] = []
        with recording(model, lambda name, record, into=records: into.append((name, record))):
            run(IDS)
        runs.append(records)
        compiled(IDS)
        assert len(records) == 2  # none from outside the context
    assert len(graphs.seen) == 2
    on, off = sorted(graphs.seen, key=lambda seen: len(seen[0]), reverse=True)
    assert off == never.seen[0]
    assert off[1] == 1  # the logits alone
    assert on[1] > off[1]
    assert len(on[0]) > len(off[0])
    for records in runs:
        assert [name for name, _ in records] == ["layers.0.attention", "layers.0.mlp"]
        for (_, one), (_, two) in zip(records, runs[0], strict=True):
            for field, a, b in zip(RewriteRecord._fields, one, two, strict=True):
                assert (a is None) == (b is None), field
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, f=field: f"{f}: {text}")

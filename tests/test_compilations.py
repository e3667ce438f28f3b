"""How often torch.compile compiles a net of delta residuals: as often as a plain one's, once more for `recording`, once
for `intervening`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepdelta import DeltaResidual, DeltaStream, Intervention, intervening, recording, use_backend

pytestmark = pytest.mark.usefixtures("unchecked")
WIDTH = 6


class Counter:
    """A backend that runs each graph as it is and counts them."""

    frame_count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.frame_count += 1
        return graph.forward


class Plain(nn.Module):
    """x + f(norm(x)), two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.branches = nn.ModuleList(branch() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, f in zip(self.norms, self.branches, strict=True):
            x = x + f(norm(x))
        return x


class Delta(nn.Module):
    def __init__(self, *, chained: bool, **settings: Any) -> None:
        super().__init__()
        self.stream = DeltaStream(WIDTH, seed=0, **settings)
        blocks = [self.stream.wrap(branch()) for _ in range(2)]
        self.blocks = self.stream.chain(blocks) if chained else nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.stream.reduce(self.blocks(self.stream.expand(x)))


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.0))


def compilations(net: nn.Module, counter: Any, compiled: Any) -> list[int]:
    """How many there have been after each of what a training run does."""
    optimizer, counts = torch.optim.SGD(net.parameters(), lr=0.1), []

    def call(batch: int, tokens: int) -> None:
        output = compiled(torch.ones(batch, tokens, WIDTH))
        if output.requires_grad:
            output.sum().backward()
        counts.append(counter.frame_count)

    for batch, tokens in ((1, 5), (2, 5), (3, 5), (3, 6), (3, 7), (2, 9)):
        call(batch, tokens)
        optimizer.param_groups[0]["lr"] /= 2
        optimizer.step()
    for training in (False, True):
        net.train(training)
        call(3, 6)
        with torch.no_grad():
            call(3, 6)
            call(4, 7)
    optimizer.zero_grad()
    for _ in range(2):
        call(3, 6)
    return counts


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({"chained": True}, "fused"),
        *(
            pytest.param(settings, "reference", marks=pytest.mark.scale)
            for settings in (
                {"chained": True},
                {"chained": True, "value_channels": 1},
                {"chained": False, "rule": "two_gate", "compression": "token"},
            )
        ),
    ],
    ids=["fused", "delta", "V = 1", "two_gate"],
)
def test_as_many_compilations_as_a_plain_net(settings: dict[str, Any], backend: Any) -> None:
    torch.manual_seed(0)  # of some starts the steps lead to no finite number
    counts = []
    for net in (Plain(), Delta(**settings)):
        torch._dynamo.reset()
        if isinstance(net, Delta):
            use_backend(net, backend)
        counter = Counter()
        compiled = torch.compile(net, backend=counter)
        counts.append(compilations(net, counter, compiled))
    assert counts[1] == counts[0]

    before, x = counter.frame_count, torch.ones(3, 6, WIDTH)
    for _ in range(3):
        records = list[str]()
        with recording(net, lambda name, record, into=records: into.append(name)):
            compiled(x)
        assert len(records) == 2
    assert counter.frame_count == before + 1
    name = next(name for name, part in net.named_modules() if isinstance(part, DeltaResidual))
    for gate in (0.0, 0.25, 1.0, 1.5, 2.0):
        with intervening(net, {name: Intervention(gate=gate)}):
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)
    compiled(x)
    assert counter.frame_count == before + 2

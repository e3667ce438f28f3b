"""torch.func through residuals in plain PyTorch: gradients of single samples."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from deepdelta import DeltaStream, use_backend
from helpers import perturb, randn


class Network(nn.Module):
    def __init__(self, rule: str, channels: int) -> None:
        super().__init__()
        self.stream = DeltaStream(6, channels, rule=rule, seed=1)
        self.blocks = nn.ModuleList(self.stream.wrap(nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        state = self.stream.expand(x)
        for block in self.blocks:
            state = block(state)
        return self.stream.reduce(state).square().sum()


@pytest.mark.parametrize(("rule", "channels"), [("delta", 1), ("delta", 3), ("two_gate", 3)])
def test_transforms_of_a_network(rule: str, channels: int, unchecked: None) -> None:
    network = Network(rule, channels).double()
    perturb(network)
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    x = randn(4, 5, 6)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, parameters, (x,))

    by_sample = vmap(grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        network.zero_grad()
        network(sample).backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(by_sample[name][index], parameter.grad, rtol=1e-10, atol=1e-12)


def test_the_fused_step_refuses_them(unchecked: None) -> None:
    network = Network("delta", 3)
    use_backend(network, "fused")
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(lambda x: network(x))(randn(5, 6).float())

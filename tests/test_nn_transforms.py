"""torch.func and second derivatives: by plain PyTorch; refused by fused code, and by memory plans where they save."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from deepdelta import DeltaStream, UserError, use_backend, use_memory
from helpers import perturb, randn

# Of PyTorch's own rules for jvp, which it scripts when the first of them is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


class Network(nn.Module):
    def __init__(self, rule: str, channels: int, **options: Any) -> None:
        super().__init__()
        self.stream = DeltaStream(6, channels, rule=rule, seed=1, **options)
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


def second(network: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def forward_mode(network: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return network(forward_ad.make_dual(x, torch.ones_like(x)))


def batched(network: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss = network(x)
    return torch.autograd.grad(loss, x, torch.ones(2, *loss.shape), is_grads_batched=True)[0]


def batched_by_vmap(network: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss = network(x)
    return vmap(lambda g: torch.autograd.grad(loss, x, g)[0])(torch.ones(2, *loss.shape))


ASKED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda network, x: grad(network)(x),
    "vmap": lambda network, x: vmap(network)(torch.stack([x, x])),
    "jvp": lambda network, x: jvp(network, (x,), (x,)),
    "vjp": lambda network, x: vjp(network, x)[1](torch.tensor(1.0)),
    "jacrev": lambda network, x: jacrev(network)(x),
    "jacfwd": lambda network, x: jacfwd(network)(x),
    "hessian": lambda network, x: hessian(network)(x),
    "autograd.functional.hessian": lambda network, x: torch.autograd.functional.hessian(network, x),
    "forward mode": forward_mode,
    "second derivatives": second,
    "batched gradients": batched,
    "batched gradients by vmap": batched_by_vmap,
}


@pytest.mark.parametrize("options", [{}, {"expansion": "embedding_conv"}, {"compression": "token"}], ids=str)
@pytest.mark.parametrize("asked", ASKED)
def test_fused_code_refuses_what_it_has_no_derivatives_for(asked: str, options: dict, unchecked: None) -> None:
    """Also where PyTorch would answer: jvp of an operator without a rule for it has tangents of 0."""
    network, x = Network("delta", 3, **options), randn(5, 6).float()
    use_backend(network, "fused")
    with pytest.raises(UserError, match=r'first derivatives by backward.*use_backend\(module, "reference"\)'):
        ASKED[asked](network, x)
    if options and "batched" not in asked:
        # The convolutions by themselves.
        for block in network.blocks:
            block.runtime = block.runtime._replace(backend="reference")
        with pytest.raises(UserError, match=r'use_backend\(module, "reference"\)'):
            ASKED[asked](network, x)


def test_first_derivatives_with_a_graph_are_fused_code_s_too(unchecked: None) -> None:
    network, x = Network("delta", 3).double(), randn(5, 6).requires_grad_()
    (expected,) = torch.autograd.grad(network(x), x)
    use_backend(network, "fused")
    (gradient,) = torch.autograd.grad(network(x), x, create_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plan", ["replay", "recover"])
def test_memory_plans(plan: str, unchecked: None) -> None:
    """Second derivatives are those of the plan save; torch.func is refused where it would need saved states."""
    network, x = Network("delta", 3).double(), randn(5, 6)
    results = []
    for chosen in ("save", plan):
        use_memory(network, chosen, every=2)
        results.append([second(network, x), vmap(network)(torch.stack([x, x])), jvp(network, (x,), (x,))[1]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    message = rf"the memory plan '{plan}' is for backward.*use_memory\(module, \"save\"\)"
    for transform in (grad, jacrev, hessian):
        with pytest.raises(UserError, match=message):
            transform(network)(x)

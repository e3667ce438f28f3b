"""What is done to a module inside a residual or a GPT takes effect: hooks, parametrizations, pruning, replacements.

Some passes use the parameters of a module in place of a call of it; they may do so only while nobody can tell.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, UserError, use_backend
from deepdelta.decoding import DecodingCache
from deepdelta.nn import DeltaResidual, DeltaStream
from helpers import perturb

pytestmark = pytest.mark.usefixtures("unchecked_file")
SETTINGS = {
    "additive": PRESETS["additive"],
    "paper-cc": PRESETS["paper-cc"],
    "paper-scalar": PRESETS["paper-scalar"],
    "token": ResidualConfig(rule="write_only", compression="token", compression_sharing="block"),
    "erase_only": ResidualConfig(rule="erase_only", compression="channel_conv"),
    "affine": ResidualConfig(target="affine"),
    "two_gate": ResidualConfig(rule="two_gate"),
    "pooled": ResidualConfig(direction="pooled", target="branch", gate="two_layer", rank=2),
}
BACKENDS = ["reference", "fused"]
IDS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
every_setting = pytest.mark.parametrize("name", SETTINGS)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def model_of(name: str, backend: str) -> GPT:
    """In fp64, in which other files have the same settings compiled too."""
    sizes = {"vocab_size": 11, "dim": 12, "heads": 2, "layers": 2, "context": 8}
    model = GPT(GPTConfig(**sizes, residual=SETTINGS[name]), seed=3).double()
    perturb(model)
    use_backend(model, backend)
    return model


def decoded(model: GPT) -> Tensor:
    """The logits of cached decoding: some ids at once, then one at a time."""
    cache = DecodingCache(model, len(IDS))
    return torch.cat([cache.decode(IDS[:, :3]), *(cache.decode(IDS[:, i : i + 1]) for i in range(3, 6))], 1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def called(model: GPT) -> Iterator[tuple[str, nn.Module, int]]:
    """The modules of a GPT that have a forward, and how often one pass calls each."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | DeltaStream | GPT):
            continue
        if name == "rotary":
            yield name, module, 2 * len(model.layers)
        else:
            # The MLP reads through the attention's compression where they share one.
            shared = name.endswith("attention.compression") and model.config.residual.compression_sharing == "block"
            yield name, module, 1 + shared


@every_setting
@both_backends
def test_a_hook_runs_once_a_pass(name: str, backend: str) -> None:
    model = model_of(name, backend)
    expected = model(IDS).logits
    for path, module, times in called(model):
        if path.startswith("layers.0.") and name != "paper-cc":
            continue
        count = []
        with module.register_forward_hook(lambda *_, count=count: count.append(1)):
            logits = model(IDS).logits
            assert len(count) == times, path
            close(logits, expected)
            if not path.startswith("layers.0"):
                close(decoded(model), expected)
                # One prefill and three tokens.
                assert len(count) == 5 * times, path


@both_backends
def test_backward_hooks_run_on_every_part(backend: str) -> None:
    """torch gives them gradients of tensors and tuples alone."""
    model, seen = model_of("paper-cc", backend), set[str]()
    names = [name for name, part in model.named_modules() if name.rpartition(".")[2] in ("direction", "gate", "target")]
    assert len(names) == 14  # the gates of the MLPs among them
    for name in names:
        part = model.get_submodule(name)
        part.register_full_backward_hook(lambda module, given, wanted, name=name: seen.add(name))
    model(IDS, IDS).loss.backward()
    assert seen == set(names)


def test_a_hook_on_every_module_runs_too() -> None:
    model, paths = model_of("paper-cc", "fused"), []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: paths.append(module)):
        model(IDS)
    for path, module, times in called(model):
        assert paths.count(module) == times, path


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def weighted(model: GPT) -> Iterator[str]:
    """The modules with a weight, of the layers those of the second."""
    for name, module in model.named_modules():
        if "weight" in dict(module.named_parameters(recurse=False)) and not name.startswith("layers.0"):
            yield name


@every_setting
@both_backends
def test_a_parametrization_is_used(name: str, backend: str) -> None:
    model = model_of(name, backend)
    for path in list(weighted(model)):
        module = model.get_submodule(path)
        with torch.no_grad():
            module.weight.mul_(2)
        expected = model(IDS).logits
        (of_weight,) = torch.autograd.grad(expected.square().mean(), module.weight)
        with torch.no_grad():
            module.weight.div_(2)
        parametrize.register_parametrization(module, "weight", Doubled())
        actual = model(IDS).logits
        close(actual, expected)
        close(decoded(model), expected)
        (of_original,) = torch.autograd.grad(actual.square().mean(), module.parametrizations.weight.original)
        close(of_original, 2 * of_weight)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


@both_backends
@pytest.mark.parametrize("part", ["target.map", "gate.outer", "norm", "compression"])
def test_pruning_goes_on_being_trained(part: str, backend: str) -> None:
    model, expected = model_of("paper-cc", backend), model_of("paper-cc", backend)
    pruned, plain = (one.get_submodule(f"layers.1.mlp.{part}") for one in (model, expected))
    prune.l1_unstructured(pruned, "weight", 0.5)
    mask = pruned.weight_mask
    for _ in range(2):
        with torch.no_grad():
            pruned.weight_orig.mul_(1.5)
            plain.weight.copy_(pruned.weight_orig * mask)
            expected.zero_grad()
        actual = model(IDS).logits
        close(actual, expected(IDS).logits)
        model.zero_grad()
        actual.square().mean().backward()
        expected(IDS).logits.square().mean().backward()
        close(pruned.weight_orig.grad, plain.weight.grad * mask)
    close(decoded(model), actual)


class Half(nn.Module):
    """A gate that is open by half, whatever it sees."""

    def forward(self, c: Tensor) -> list[Tensor]:
        return [torch.full_like(c[..., :1], 0.5)]


@both_backends
def test_a_replaced_gate_is_used(backend: str) -> None:
    model, expected = model_of("paper-cc", backend), model_of("paper-cc", backend)
    model.layers[0].mlp.gate = Half()
    with torch.no_grad():
        outer = expected.layers[0].mlp.gate.outer
        outer.weight.zero_()
        outer.bias.fill_(torch.tensor(0.25, dtype=torch.float64).logit().item())
    close(model(IDS).logits, expected(IDS).logits)
    close(decoded(model), expected(IDS).logits)


@both_backends
@pytest.mark.parametrize("place", ["layers.0", "layers.0.attention", "layers.1.mlp", "layers.1"])
@pytest.mark.parametrize("name", ["additive", "paper-cc", "token"])
def test_what_a_hook_makes_of_a_state_goes_on(name: str, place: str, backend: str) -> None:
    model = model_of(name, backend)
    steps = {f"layers.{i}.{part}": getattr(model.layers[i], part) for i in (0, 1) for part in ("attention", "mlp")}
    state = model.stream.expand(model.embedding(IDS))
    for path, residual in steps.items():
        state = residual(state)
        if path == place or (path.endswith(".mlp") and path.startswith(place)):
            state = state + 0.3
    expected = model.norm(model.stream.reduce(state)) @ model.embedding.weight.T
    with model.get_submodule(place).register_forward_hook(lambda module, args, state: state + 0.3):
        assert f"opening their own state: {place} (" in repr(model)
        close(model(IDS).logits, expected)
        close(decoded(model), expected)
    assert "each residual opens the next" in repr(model)


@both_backends
# torch's own, while it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_layer_compiled_alone(backend: str, unchecked: None) -> None:
    model = model_of("paper-cc", backend)
    expected = model(IDS).logits
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for layer in model.layers:
        layer.compile(backend=keep, fullgraph=True)
    close(model(IDS).logits, expected)
    assert graphs


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("paper-cc", "layers.1.mlp", "DeltaResidual"),
        ("token", "layers.0.attention.compression", "TokenConvolution"),
        ("token", "stream.readout", "TokenConvolution"),
        ("paper-cc", "stream.expansion", "EmbeddingConvolution"),
    ],
)
def test_decoding_refuses_parts_that_it_does_not_know(name: str, path: str, kind: str) -> None:
    model = model_of(name, "reference")
    model.set_submodule(path, nn.Identity())
    with pytest.raises(UserError, match=f"needs a {kind} as .*{path.removesuffix('.compression')}, got Identity"):
        DecodingCache(model)


def test_a_residual_in_a_network_of_ones_own() -> None:
    stream = DeltaStream(8, rule="delta", seed=1)
    block = stream.wrap(nn.Linear(8, 8))
    perturb(block)
    twin: DeltaResidual = copy.deepcopy(block)
    x = stream.expand(torch.randn(3, 8))
    with block.gate.register_forward_hook(lambda module, args, betas: [0 * beta for beta in betas]):
        assert torch.equal(block(x), x)
    assert torch.equal(block(x), twin(x)) and not torch.equal(block(x), x)

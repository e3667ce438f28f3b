"""Modules that are built on the device 'meta' and filled later compute what those built on the CPU do."""

import copy
import pickle
import tempfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from deepdelta import GPT, PRESETS, DeltaStream, GPTConfig, retrofit
from deepdelta.decoding import DecodingCache
from helpers import perturb, randn

IDS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))


def config(preset: str = "paper-cc", layers: int = 2) -> GPTConfig:
    return GPTConfig(vocab_size=11, dim=12, heads=2, layers=layers, context=8, residual=PRESETS[preset])


def filled(build: Callable[[], nn.Module], like: nn.Module, assign: bool) -> nn.Module:
    """What `build` makes on 'meta', with the values of `like`."""
    with torch.device("meta"):
        module = build()
    assert all(parameter.is_meta for parameter in module.parameters())
    if not assign:
        module.to_empty(device="cpu")
    assert not any(module.load_state_dict(like.state_dict(), assign=assign))
    return module


@pytest.fixture(params=[False, True], ids=["to_empty", "assign"])
def models(request: pytest.FixtureRequest) -> tuple[GPT, GPT]:
    """A GPT built on the CPU, and one of the same values built on 'meta'."""
    real = GPT(config(), seed=5)
    perturb(real)
    return real, filled(lambda: GPT(config()), real, request.param)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset: str, assign: bool) -> None:
    real = GPT(config(preset), seed=5)
    perturb(real)
    model = filled(lambda: GPT(config(preset)), real, assign)
    assert torch.equal(model(IDS).logits, real(IDS).logits)
    assert torch.equal(DecodingCache(model, 2).decode(IDS), DecodingCache(real, 2).decode(IDS))


def test_a_retrofit() -> None:
    def build() -> GPT:
        return retrofit(GPT(config("additive")))

    real = build()
    perturb(real)
    for assign in (False, True):
        assert torch.equal(filled(build, real, assign)(IDS).logits, real(IDS).logits)


def test_a_stream_without_a_seed() -> None:
    def build() -> nn.ModuleList:
        stream = DeltaStream(6)
        return nn.ModuleList([stream, stream.wrap(nn.Linear(6, 6))])

    def run(modules: nn.ModuleList, x: Tensor) -> Tensor:
        return modules[0].reduce(modules[1](modules[0].expand(x)))

    real = build()
    x = randn(3, 6).float()
    for assign in (False, True):
        assert torch.equal(run(filled(build, real, assign), x), run(real, x))
    with torch.device("meta"):
        assert run(build(), torch.empty(3, 6)).shape == (3, 6)


def test_the_seed_is_the_one_drawn_elsewhere() -> None:
    torch.manual_seed(3)
    seed = DeltaStream(6).seed
    torch.manual_seed(3)
    with torch.device("meta"):
        assert DeltaStream(6).seed == seed


def test_compiled_and_exported_first(unchecked: None) -> None:
    real = GPT(config(layers=1), seed=5)
    model = filled(lambda: GPT(config(layers=1)), real, assign=True)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(IDS).logits, compiled(IDS).logits)
    torch.testing.assert_close(compiled(IDS).logits, real(IDS).logits, rtol=1e-5, atol=1e-6)
    exported = torch.export.export(model, (IDS,)).module()
    torch.testing.assert_close(exported(IDS)[0], real(IDS).logits, rtol=1e-5, atol=1e-6)
    # Tracing leaves nothing of its own behind.
    assert torch.equal(model(IDS).logits, real(IDS).logits)


def test_used_first_where_tensors_are_special(models: tuple[GPT, GPT], unchecked: None) -> None:
    """Under inference_mode and in torch.func, neither of which may leave its tensors in the model."""
    real, model = models
    other = copy.deepcopy(model)
    with torch.inference_mode():
        model(IDS)
    model(IDS).logits.sum().backward()
    parameters = {name: parameter.detach() for name, parameter in other.named_parameters()}
    grad(lambda parameters: functional_call(other, parameters, (IDS,)).logits.sum())(parameters)
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(other)))(IDS).logits, real(IDS).logits)


def test_emptied_and_filled_again() -> None:
    real = GPT(config(), seed=5)
    model = copy.deepcopy(real).to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    assert torch.equal(model(IDS).logits, real(IDS).logits)
    wide = copy.deepcopy(real).bfloat16().double()
    narrow = {name: tensor.bfloat16().double() for name, tensor in real.state_dict().items()}
    expected = copy.deepcopy(real).double()
    expected.load_state_dict(narrow)
    assert torch.equal(wide(IDS).logits, expected(IDS).logits)


def test_a_model_in_transformers() -> None:
    """from_pretrained builds on 'meta' and fills buffers that no file holds with arbitrary numbers."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "deepdelta_probe"

    class Wrapper(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, settings: Config) -> None:
            super().__init__(settings)
            self.gpt = GPT(config(), seed=5)
            self.post_init()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.gpt(input_ids).logits

    real = Wrapper(Config())
    perturb(real)
    with tempfile.TemporaryDirectory() as folder:
        real.save_pretrained(folder)
        assert torch.equal(Wrapper.from_pretrained(folder)(IDS), real(IDS))

"""Looped GPTs: the layers repeated with the same weights, each repetition told the embeddings; trained, decoded,
exported and counted as what they are when written out."""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, UserError, use_backend
from deepdelta.cli import main
from deepdelta.data import load_corpus
from deepdelta.decoding.cache import DecodingCache
from deepdelta.device import choose_device
from deepdelta.exporting.decoder import Decoder
from deepdelta.hf.configuration import DeepDeltaConfig
from deepdelta.hf.lines import CACHE
from deepdelta.hf.modeling import DeepDeltaForCausalLM
from deepdelta.interop.published import published_config
from deepdelta.models import language_model, parameter_count, rivals
from deepdelta.models.flops import training_flops_per_token
from deepdelta.planning import bytes_per_token
from deepdelta.training import RunDirectory, TrainConfig, evaluate
from deepdelta.training.parallel import check_parallel
from deepdelta.training.ranks import Ranks
from deepdelta.training.step import micro_losses, step_batch, step_repeats
from helpers import perturb, randn
from tiny_runs import config, nats, quietly, text_file

REPEATS = 3
RESIDUALS = {
    "additive": PRESETS["additive"],
    "ddl": PRESETS["ddl"],
    "paper-tc": PRESETS["paper-tc"],
    "code-cc": PRESETS["code-cc"],
    "query": dataclasses.replace(PRESETS["plain-start"], query=True),
    "channels": ResidualConfig(rule="channels", value_channels=3),
}


pytestmark = pytest.mark.usefixtures("unchecked")


def looped(residual: ResidualConfig, repeats: int | None = REPEATS, **sizes: Any) -> GPT:
    made = GPTConfig(
        **{"vocab_size": 13, "dim": 12, "heads": 2, "layers": 2, "context": 16, **sizes},
        repeats=repeats,
        residual=residual,
    )
    model = GPT(made, seed=3).double()
    perturb(model, size=0.1)
    return model.eval()


def written_out(model: GPT, ids: Tensor, repeats: int) -> Tensor:
    """The logits, one residual called after the other; the first attention of a repetition with c + norm(x)."""
    x_BTD = model.embedding(ids)
    scale = (x_BTD.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert model.injection is not None
    told = x_BTD * scale * model.injection.weight
    state = model.stream.expand(x_BTD)
    for _ in range(repeats):
        for index, layer in enumerate(model.layers):
            with adding(layer.attention.branch, told if index == 0 else torch.zeros_like(told)):  # type: ignore[union-attr]
                state = layer.attention(state)  # type: ignore[operator]
            state = layer.mlp(state)  # type: ignore[operator]
    c_BTD = model.norm(model.stream.readout(state))
    return F.linear(c_BTD, model.embedding.weight)


@contextmanager
def adding(branch: nn.Module, told: Tensor) -> Iterator[None]:
    """Within it, a branch sees `told` on top of its input."""
    hook = branch.register_forward_pre_hook(lambda _, args: (args[0] + told, *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("name", "backend"), [*((name, "reference") for name in RESIDUALS), ("ddl", "fused")])
@pytest.mark.parametrize("repeats", [1, 4])
def test_logits_and_gradients_are_those_of_the_layers_written_out(name: str, backend: Any, repeats: int) -> None:
    model, tokens = looped(RESIDUALS[name]), ids()
    use_backend(model, backend)
    logits, expected = model(tokens, repeats=repeats).logits, written_out(model, tokens, repeats)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    cotangent, parameters = randn(*logits.shape, seed=7), list(model.parameters())
    found = [torch.autograd.grad(one, parameters, cotangent) for one in (logits, expected)]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


def test_without_another_number_the_configurations_is_taken() -> None:
    model, tokens = looped(PRESETS["ddl"]), ids()
    assert torch.equal(model(tokens).logits, model(tokens, repeats=REPEATS).logits)
    assert not torch.equal(model(tokens).logits, model(tokens, repeats=2).logits)
    # As many parameters, and no more, than the two layers have.
    once = sum(p.numel() for p in looped(PRESETS["ddl"], None).parameters())
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters()) == once + 12
    # Outputs of branches start smaller, as of a model so deep.
    starts = [GPT(dataclasses.replace(model.config, repeats=r)).layers[0].mlp.branch.out.weight for r in (1, 4)]
    torch.testing.assert_close(starts[1], starts[0] / 2)


@pytest.mark.parametrize("name", RESIDUALS)
def test_cached_decoding_keeps_what_every_repetition_needs(name: str) -> None:
    model, tokens = looped(RESIDUALS[name]), ids(length=12)
    with torch.no_grad():
        expected = model(tokens).logits
    for pieces in ([12], [1] * 12, [4, 1, 6, 1]):
        cache = DecodingCache(model, batch=2)
        logits = torch.cat([cache.decode(piece) for piece in tokens.split(pieces, 1)], 1)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    padded = DecodingCache(model, 2, padding=[0, 5])
    row = torch.cat([padded.decode(piece) for piece in tokens.split([7, 1, 4], 1)], 1)[1, 5:]
    with torch.no_grad():
        alone = model(tokens[1:, 5:]).logits[0]
    torch.testing.assert_close(row, alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddl", "paper-tc"])
def test_exported_decoding_and_transformers_repeat_too(name: str, tmp_path: Path) -> None:
    model, tokens = looped(RESIDUALS[name]).float(), ids()
    use_backend(model, "reference")
    expected, decoder = model(tokens).logits, Decoder(model)
    kept, found = decoder.nothing(2), []
    for piece in tokens.split([3, 1, 5], 1):
        logits, kept = decoder(piece, torch.ones_like(piece), kept)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
    DeepDeltaForCausalLM.from_gpt(model).save_pretrained(tmp_path)
    theirs = DeepDeltaForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.num_repeats == REPEATS
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    cache, found = DynamicCache(config=theirs.config), []
    for piece in tokens.split([3, 1, 5], 1):
        found.append(theirs(piece, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
    assert len(cache.layers) == REPEATS * 2


def test_the_work_is_that_of_as_many_layers() -> None:
    flat, deep, long = (
        training_flops_per_token(GPTConfig(vocab_size=13, dim=12, heads=2, context=16, layers=n, repeats=r))
        for n, r in ((2, 1), (6, 1), (2, 3))
    )
    assert deep.matrix_forward == long.matrix_forward > flat.matrix_forward
    # Twice more the sum with the embeddings.
    assert long.forward == deep.forward + 2 * 12
    # In memory too, but for the inputs of each first attention with and without what it is told.
    sizes = {"vocab_size": 13, "dim": 12, "heads": 2, "context": 16, "residual": PRESETS["additive"]}
    held = [bytes_per_token(GPTConfig(**sizes, layers=n, repeats=r)).held for n, r in ((4, None), (2, 2))]
    assert 0 < held[1] - held[0] < 4 * 4 * 12 * 4


@pytest.mark.parametrize("rival", ["hyper-connections", "identity-hyper", "retention", "gru"])
def test_rivals_repeat_their_layers(rival: Any) -> None:
    """As the same sublayers one after another, the first of each repetition told the embeddings."""
    settings = GPTConfig(vocab_size=13, dim=12, heads=2, layers=2, context=16, repeats=REPEATS, rival=rival)
    model, tokens = language_model(settings, seed=3).double(), ids()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * randn(1, *parameter.shape, seed=number)[0]
    x_BTD = model.embedding(tokens)
    assert model.injection is not None
    told = model.injection(x_BTD)
    first = next(module for module in model.modules() if type(module).__name__ == "Attention")
    body, times = model.body, 4
    with adding(first, told):
        if isinstance(body, rivals.Streamed):
            expand, *wrapped, reduce = body
            state = nn.Sequential(*wrapped * times)(expand(x_BTD))
            read = reduce(state)
        elif isinstance(body, rivals.XTransformersBody):
            read = x_BTD
            for norm, branch, join in list(zip(body.norms, body.branches, body.joins, strict=True)) * times:
                inner, kept, known = join.prepare(read)
                read = join(branch(norm(inner)), kept, **known)
        else:
            # A body of as many sublayers, each of them one of these.
            deep = copy.copy(body)
            deep._modules = dict(body._modules)
            for name in ("branches", "weights"):
                setattr(deep, name, nn.ModuleList(list(getattr(body, name)) * times))
            read = deep(x_BTD)
    expected = F.linear(model.norm(read), model.embedding.weight)
    torch.testing.assert_close(model(tokens, repeats=times).logits, expected, rtol=1e-10, atol=1e-10)
    assert not torch.equal(model(tokens).logits, expected)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("source") / "text.txt")


def drawn(source: Path, steps: int, **more: Any) -> TrainConfig:
    return config(source, steps=steps, warmup=1, draw_repeats=True, model={"repeats": 4}, **more)


def test_a_run_that_draws_goes_on_bit_for_bit(source: Path, tmp_path: Path) -> None:
    settings = drawn(source, 6, checkpoint_every=3, schedule="constant")
    quietly(dataclasses.replace(settings, steps=3), tmp_path / "stopped")
    quietly(settings, tmp_path / "stopped")
    quietly(settings, tmp_path / "whole")
    rows = [
        [row["loss"] for row in RunDirectory(tmp_path / one).metrics() if "loss" in row] for one in ("stopped", "whole")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    # Every loss is that of the number that was drawn: the first, of new weights, made again.
    model, corpus = (
        language_model(RunDirectory(tmp_path / "whole").config().model, seed=settings.seed),
        load_corpus(settings.data),
    )
    resolved = RunDirectory(tmp_path / "whole").config()
    assert resolved.draw_repeats and isinstance(model, GPT)
    use_backend(model, "reference")
    batch, times = step_batch(resolved, corpus, 0), step_repeats(resolved, 0)
    losses = {
        r: sum(micro_losses(model, *batch, 1, choose_device("cpu", "fp32"), repeats=r)).item() for r in (1, 2, 3, 4)
    }  # type: ignore[union-attr]
    assert losses[times] == rows[0][0] and len(set(losses.values())) == 4  # type: ignore[index]


def test_what_is_drawn_is_even_and_follows_from_seed_and_step(source: Path) -> None:
    settings = drawn(source, 2000)
    found = [step_repeats(settings, step) for step in range(2000)]
    counts = [found.count(r) for r in range(1, 5)]
    assert sum(counts) == 2000 and sum((one - 500) ** 2 / 500 for one in counts) < 16.3  # chi^2, 3 degrees, p = 0.001
    other = dataclasses.replace(settings, seed=1)
    assert [step_repeats(other, step) for step in range(50)] != found[:50]
    assert step_repeats(dataclasses.replace(settings, draw_repeats=False), 0) is None


def test_a_run_is_evaluated_at_other_numbers(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quietly(drawn(source, 2), tmp_path / "run")
    model, corpus = (
        RunDirectory(tmp_path / "run").model().eval(),
        load_corpus(RunDirectory(tmp_path / "run").config().data),
    )
    assert isinstance(model, GPT)
    found = {}
    for repeats in (1, 4, 9):
        main(["evaluate", str(tmp_path / "run"), "--repeats", str(repeats)])
        printed = re.search(r"loss +([0-9.]+) nats(?s:.*); the layers repeated (\d+) times", capsys.readouterr().out)
        assert printed and int(printed[2]) == repeats
        loss = evaluate(model, corpus, batch_size=8, device=torch.device("cpu"), repeats=repeats).loss
        again = copy.copy(model)
        again.config = dataclasses.replace(model.config, repeats=repeats)
        assert loss == pytest.approx(sum(own := nats(again, corpus.validation)) / len(own), rel=1e-5)
        assert float(printed[1]) == pytest.approx(loss, abs=6e-5)
        found[repeats] = loss
    assert len(set(found.values())) == 3


def test_an_audit_knows_repetitions(source: Path, tmp_path: Path) -> None:
    """The shortcut is that of all of them, and so are a residual's numbers."""
    quietly(drawn(source, 3), tmp_path / "run")
    main(["audit", str(tmp_path / "run"), "--tokens", "32", "--sample", "8"])
    found = json.loads((tmp_path / "run" / "audit" / "audit.json").read_text())["findings"]
    names = [f"layers.0.{part} ({time})" for time in range(1, 5) for part in ("attention", "mlp")]
    assert [one["residual"] for one in found["shortcut"]["depth"]] == names and found["shortcut"]["factors"] == 8
    assert [one["name"] for one in found["residuals"]] == ["layers.0.attention", "layers.0.mlp"]
    # A snapshot of two sublayers before: in every repetition but the first.
    snapshots = [
        one for residual in found["residuals"] for one in residual["alternatives"] if one["name"] == "snapshot"
    ]
    assert len(snapshots) == 2
    page = (tmp_path / "run" / "audit" / "audit.html").read_text()
    assert "0 mlp (4)" in page and "1 layer, repeated: 4, width 16" in page
    model = RunDirectory(tmp_path / "run").model()
    assert "1 layer, repeated: 4; each residual opens the next" in repr(model)


def test_an_evaluation_that_is_refused_leaves_the_model_as_it_was(source: Path) -> None:
    corpus = load_corpus(config(source).data)
    model = looped(PRESETS["additive"], None, vocab_size=256).train()
    with pytest.raises(UserError, match="repeats=2 is for a looped GPT"):
        evaluate(model, corpus, batch_size=2, device=torch.device("cpu"), repeats=2)
    assert model.training


def test_what_is_refused(source: Path) -> None:
    with pytest.raises(UserError, match=r"repeats=2 is for a looped GPT.*GPTConfig\(repeats=...\)"):
        looped(PRESETS["ddl"], None)(ids(), repeats=2)
    with pytest.raises(UserError, match="repeats must be at least 1, got 0"):
        looped(PRESETS["ddl"])(ids(), repeats=0)
    with pytest.raises(UserError, match="repeats must"):
        GPTConfig(repeats=0)
    with pytest.raises(UserError, match="'attention' reads the outputs of all sublayers before"):
        GPTConfig(rival="attention", repeats=2)
    with pytest.raises(UserError, match=r"num_hidden_layers counts every repetition.* got 4 and 3\."):
        DeepDeltaConfig(num_hidden_layers=4, num_repeats=3)
    with pytest.raises(UserError, match="layers times repeats must be at most"):
        GPTConfig(layers=1 << 23, repeats=4)
    with pytest.raises(UserError, match=r"draw_repeats is for a looped GPT: set model\.repeats"):
        config(source, draw_repeats=True)
    with pytest.raises(UserError, match="draw_repeats and compile do not go together"):
        drawn(source, 2, compile=True)
    split = drawn(source, 2, parallel="tensor")
    with pytest.raises(UserError, match=r"parallel='tensor' does not know looped GPTs.*parallel='fsdp'"):
        check_parallel(split, Ranks(0, 2, object()))
    check_parallel(dataclasses.replace(split, parallel="fsdp"), Ranks(0, 2, object()))
    with pytest.raises(UserError, match=r"the published code has no repeats=3 \(only None\)"):
        published_config(looped(PRESETS["code-cc"]).config)

"""Residuals of others in the same GPT: formulas written out token by token, causality, gradients, the same start."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deepdelta.cli import main
from deepdelta.config import from_plain
from deepdelta.errors import UserError
from deepdelta.lab.analysis.results import load_results
from deepdelta.models import GPT, GPTConfig, Rival, RivalGPT, language_model, parameter_count, rivals
from deepdelta.models.flops import training_flops_per_token
from deepdelta.nn import initialise
from deepdelta.nn.presets import PRESETS
from deepdelta.training import TrainConfig, train
from deepdelta.training.rundir import RunDirectory
from helpers import randn
from tiny_runs import RUNS, text_file, trained_here

RIVALS = get_args(Rival)
SEES_LATER = ("orthogonal", "mv-split")
"""As published: the one takes a projection, the other means, over all tokens of a sequence."""


def small(rival: Rival | None, **sizes: int) -> GPTConfig:
    return GPTConfig(**{"vocab_size": 13, "context": 12, "layers": 2, "heads": 2, "dim": 16, "rival": rival, **sizes})


class Mix(nn.Module):
    """A branch that looks at earlier tokens and is not linear."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(dim, dim, seed=seed) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.cumsum(1) @ self.weight)


def moved(module: nn.Module) -> nn.Module:
    """In fp64, no parameter of the residual where it started."""
    initialise(module, 0)
    module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            if parameter.ndim < 2 or parameter.shape[0] <= 4:
                parameter += 0.3 * randn(*parameter.shape, seed=100 + number)
    return module


def normed(x_D: Tensor, weight_D: Tensor) -> Tensor:
    return x_D / (x_D.square().mean() + 1e-5).sqrt() * weight_D


@pytest.mark.parametrize("retains", [False, True])
def test_streams_that_are_not_mixed_are_their_formula(retains: bool) -> None:
    dim, count = 6, 5
    body = moved(rivals.IdentityHyperConnections([Mix(dim, i) for i in range(count)], dim, retains=retains))
    x_BTD = randn(2, 3, dim, seed=1)
    streams = [x_BTD.clone() for _ in range(rivals.STREAMS)]
    for index in range(count):
        part, branch = body.weights[index], body.branches[index]  # type: ignore[index]
        read, write, kept = (torch.ones(2, 3, 4, dtype=torch.float64) for _ in range(3))
        for b in range(2):
            for t in range(3):
                for s in range(4):
                    n_D = normed(streams[s][b, t], part.norm.weight)
                    for kind, one in enumerate((read, write, kept) if retains else (read, write)):
                        one[b, t, s] = part.base[kind, s] + part.scale[kind] * torch.tanh(part.map.weight[kind] @ n_D)
        h_BTD = branch(sum(read[..., s, None] * streams[s] for s in range(4)))
        streams = [kept[..., s, None] * streams[s] + write[..., s, None] * h_BTD for s in range(4)]
    torch.testing.assert_close(body(x_BTD), sum(streams), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_block_attention_residuals_are_their_formula(count: int) -> None:
    dim = 6
    body = moved(rivals.BlockAttentionResiduals([Mix(dim, i) for i in range(count)], dim))
    x_BTD = randn(2, 3, dim, seed=1)

    def read(index: int, sources: list[Tensor]) -> Tensor:
        result = torch.zeros_like(x_BTD)
        for b in range(2):
            for t in range(3):
                keys = [normed(source[b, t], body.norms[index].weight) for source in sources]  # type: ignore[index]
                weights = torch.stack([key @ body.queries[index] for key in keys]).softmax(0)  # type: ignore[index]
                result[b, t] = sum(w * source[b, t] for w, source in zip(weights, sources, strict=True))
        return result

    size = -(-count // 8)
    blocks: list[list[Tensor]] = []
    for index in range(count):
        sources = [x_BTD, *(sum(block[1:], block[0]) for block in blocks)]
        h_BTD = body.branches[index](read(index, sources))  # type: ignore[index]
        if index % size == 0:
            blocks.append([])
        blocks[-1].append(h_BTD)
    assert len(blocks) <= 8
    expected = read(count, [x_BTD, *(sum(block[1:], block[0]) for block in blocks)])
    torch.testing.assert_close(body(x_BTD), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_is_the_same_gpt(rival: Rival) -> None:
    """Causal where the rival is, every parameter trained, and all but the residual as in our GPT."""
    config = small(rival)
    model, ours = language_model(config, seed=3), GPT(small(None), seed=3)
    assert isinstance(model, RivalGPT)
    assert torch.equal(model.embedding.weight, ours.embedding.weight)
    shapes = [
        sorted(
            str(tuple(p.shape))
            for part in one.modules()
            if type(part).__name__ in ("Attention", "SwiGLU")
            for p in part.parameters()
        )
        for one in (model, ours)
    ]
    assert shapes[0] == shapes[1]
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    ids = torch.randint(13, (3, 12), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    # Static gates of some start where a gradient vanishes, but each is in the graph.
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 13
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs()
    assert float(difference[:, 8:].max()) > 1e-3
    assert (float(difference[:, :8].max()) > 1e-5) == (rival in SEES_LATER)


@pytest.mark.parametrize("rival", RIVALS)
def test_a_seed_gives_the_same_rival_and_leaves_torchs_generator(rival: Rival) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (language_model(small(rival), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rival 'mhc' cannot be built: the package hyper-connections is not installed"):
        language_model(small("mhc"))
    assert isinstance(language_model(small("block-attention")), RivalGPT)


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(UserError, match="the model's context is 12 tokens, got 13"):
        language_model(small("identity-hyper"))(torch.zeros(1, 13, dtype=torch.long))


def test_a_rival_is_trained_evaluated_and_refused_where_rewrites_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None
) -> None:
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 400, encoding="utf-8")
    options = ["--model.rival", "block-attention", "--model.layers", "1", "--model.dim", "16", "--model.heads", "2"]
    options += ["--model.context", "16", "--data.source", str(text), "--batch-size", "4", "--warmup", "2"]
    main(["train", str(run), "--steps", "6", *options])
    main(["evaluate", str(run)])
    assert "nats" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(run), "--prompt", "def"])
    assert ended.value.code == 2
    assert "holds the rival 'block-attention', which has no delta residuals" in capsys.readouterr().err


def test_a_resumed_rival_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("".join(f"line {i % 13} of {i}\n" for i in range(900)), encoding="utf-8")
    plain: dict[str, Any] = {
        "model": {"rival": "identity-hyper", "layers": 1, "dim": 16, "heads": 2, "context": 16},
        "data": {"source": str(source)},
        **{"batch_size": 4, "warmup": 2, "schedule": "constant", "device": "cpu", "threads": 1},
    }
    for name, lengths in (("whole", [8]), ("resumed", [4, 8])):
        for steps in lengths:
            train(from_plain(TrainConfig, plain | {"steps": steps}), tmp_path / name, say=lambda line: None)
    whole, resumed = (RunDirectory(tmp_path / name).model().state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_study_compares_with_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """By name beside our own residuals: parameters matched, cost measured, no rewrites summarised."""
    file = tmp_path / "study.toml"
    source = text_file(tmp_path / "text.txt")
    file.write_text(
        'name = "rivals"\nquestion = "Which?"\nbaseline = "additive"\nseeds = [0, 1]\ncost_rounds = 1\n'
        "match_parameters = true\nrewrite_tokens = 70\n[train]\nsteps = 4\nwarmup = 1\neval_every = 4\n"
        "eval_tokens = 64\nfinal_eval_tokens = 100\ncheckpoint_every = 4\n"
        + RUNS.replace("SOURCE", str(source))
        + '[conditions.additive]\nsummary = "plain"\nchanges.model.residual = { rule = "additive" }\n'
        + "".join(
            f'[conditions.{name}]\nsummary = "{name}"\nchanges.model.rival = "{name}"\n'
            for name in ("mhc", "block-attention")
        ),
        encoding="utf-8",
    )
    trained_here(monkeypatch)
    main(["study", str(file), "--out", str(tmp_path / "out"), "--workers", "1"])
    results = load_results(tmp_path / "out" / "results.json")
    assert [one.rule for one in results.conditions] == ["additive", "mhc", "block-attention"]
    plain, *others = results.conditions
    for one in others:
        assert one.cost is not None and one.cost.tokens_per_second > 0
        assert one.rewrites == () and len(one.runs) == 2
        assert all(run.validation_loss is not None for run in one.runs)
        assert abs(one.parameters / plain.parameters - 1) < 0.05
    assert {(one.condition, one.reference) for one in results.contrasts} == {(n.name, "additive") for n in others}


@pytest.mark.parametrize("rival", RIVALS)
def test_what_a_rival_adds_is_counted_in_every_layer(rival: Rival) -> None:
    """Held against torch's counter of the whole net, less what it counts of the plain one."""
    config = small(rival, layers=4)
    plain = replace(config, rival=None, residual=PRESETS["additive"])
    counts = []
    for one in (config, plain):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            language_model(one)(torch.zeros(1, 12, dtype=torch.long))
        counts.append(counter.get_total_flops())
    assert training_flops_per_token(config).parts["rival"].matrix == (counts[0] - counts[1]) // 12


def test_what_a_rival_adds_is_counted_by_torch() -> None:
    """Identity hyper-connections read 2 numbers of each of S streams by a map of D: 2 D 2 S per sublayer and token."""
    config = small("identity-hyper", mlp_dim=20)
    parts = training_flops_per_token(config).parts
    assert parts["rival"].matrix == 4 * (2 * 16 * 2 * rivals.STREAMS)
    plain = training_flops_per_token(replace(config, rival=None, residual=PRESETS["additive"]))
    assert {name: work for name, work in parts.items() if name != "rival"} == plain.parts

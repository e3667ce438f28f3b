"""What comes out of a trained run: loading, the loss on a split, and text, each against a computation of its own."""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import deepdelta
from deepdelta import GPT, PRESETS, GPTConfig, UserError, generate, load
from deepdelta.data import Corpus, load_corpus
from deepdelta.training import Evaluation, evaluate
from tiny_runs import config, nats, quietly, rows, tensors, text_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    quietly(config(source, steps=40, lr=0.01), path)
    return path


@pytest.fixture(scope="module")
def corpus(source: Path) -> Corpus:
    return load_corpus(config(source).data)


def test_load(run: Path) -> None:
    for loaded in (deepdelta.load(run), deepdelta.load(str(run))):
        assert not loaded.model.training and loaded.tokenizer is not None
        saved = tensors(run)
        for name, tensor in loaded.model.state_dict().items():
            assert tensor.equal(saved[f"model.{name}"]), name
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("dé")) == "dé"


def test_load_of_what_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=f"{path} is not a run directory: it has no config.json"):
            load(path)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_loss_of_the_whole_split(run: Path, corpus: Corpus, batch_size: int) -> None:
    model = load(run).model
    expected = nats(model, corpus.validation)
    result = evaluate(model, corpus, batch_size=batch_size, device=CPU)
    assert result.tokens == len(expected) == len(corpus.validation) - 1
    assert len(corpus.validation) % 16 != 1  # so that the last window is not full
    assert result.loss == pytest.approx(math.fsum(expected) / len(expected), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.how == "consecutive windows of 16 tokens without overlap"
    assert corpus.validation_bytes == len(corpus.validation)
    bits = math.fsum(expected) / math.log(2) / corpus.validation_bytes
    assert result.bits_per_byte(corpus.validation_bytes) == pytest.approx(bits, rel=1e-6)


def test_loss_of_a_part(run: Path, corpus: Corpus) -> None:
    model = load(run).model.train()
    seen: list[tuple[int, int]] = []
    result = evaluate(model, corpus, batch_size=3, device=CPU, tokens=70, progress=lambda *done: seen.append(done))
    context, losses = model.config.context, nats(model, corpus.validation)
    there = len(losses) // context
    assert there >= 8  # or there would be nothing to spread over
    chosen = [loss for i in range(4) for loss in losses[i * there // 4 * context :][:context]]
    assert result.tokens == len(chosen) == 64
    assert result.loss == pytest.approx(math.fsum(chosen) / 64, rel=1e-6)
    assert result.how == "windows of 16 tokens without overlap, evenly spread"
    assert seen == [(1, 2), (2, 2)]
    assert model.training, "evaluation must leave the model in the mode it found it in"
    more = evaluate(model, corpus, batch_size=2, device=CPU, tokens=10**9)
    assert more == evaluate(model, corpus, batch_size=2, device=CPU)


def test_a_run_records_the_losses_that_evaluation_finds(run: Path, corpus: Corpus) -> None:
    final = rows(run)[-1]
    again = evaluate(load(run).model, corpus, batch_size=2, device=CPU)
    curve = [row for row in rows(run) if "validation_loss" in row and not row["final"]]
    assert [row["step"] for row in curve] == [8, 16, 24, 32, 40] and {row["validation_tokens"] for row in curve} == {64}
    # The run's rewrites are the fused backend's where it is installed, a loaded model's the reference.
    assert final["validation_loss"] == pytest.approx(again.loss, rel=1e-6)
    assert final["validation_tokens"] == again.tokens


def test_edges_of_an_evaluation(run: Path, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        evaluate(load(run).model, corpus, batch_size=0, device=CPU)
    assert Evaluation(1e4, 10, "").perplexity == math.inf
    assert Evaluation(math.log(8), 5, "").bits_per_byte(3) == pytest.approx(5.0)


def next_logits(model: GPT, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids[-model.config.context :]])).logits[0, -1]


def test_greedy_generation_takes_the_likeliest_id_after_the_last_context() -> None:
    # An additive model with large branches, since at the start a tied head likes the last id best.
    sizes = GPTConfig(
        vocab_size=99, context=6, layers=2, heads=2, dim=16, init_factor=4.0, residual=PRESETS["additive"]
    )
    model = GPT(sizes, seed=2).eval()
    ids = [5, 7, 11]
    drawn = list(generate(model, ids, tokens=30, temperature=0.0))
    assert len(drawn) == 30 and len(set(drawn)) > 5  # well beyond the context, and not the same id again and again
    for one in drawn:
        assert one == int(next_logits(model, ids).argmax())
        ids.append(one)
    assert list(generate(model, [5, 7, 11], tokens=30, temperature=5.0, top_k=1)) == drawn
    assert list(generate(model, [5, 7, 11], tokens=30, temperature=1e-3, seed=9)) == drawn


def test_seeds_decide_the_draw(run: Path) -> None:
    model = load(run).model
    drawn = [tuple(generate(model, [100], tokens=20, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(5)
    assert tuple(generate(model, [100], tokens=20, seed=0)) == drawn[0], "torch's own generator must not matter"


def test_top_k_draws_among_the_k_likeliest(run: Path) -> None:
    model = load(run).model
    ids, ranks = [100], set()
    for one in generate(model, ids, tokens=60, temperature=3.0, top_k=3):
        ranks.add(next_logits(model, ids).sort(descending=True).indices.tolist().index(one))
        ids.append(one)
    assert ranks == {0, 1, 2}


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    model = GPT(GPTConfig(vocab_size=5, context=4, layers=1, heads=1, dim=8, embedding_std=1.0), seed=3).eval()
    probabilities = (next_logits(model, [2, 1]).double() / 2.0).softmax(0)
    assert probabilities.max() > 2 * probabilities.min()
    draws = 600
    counts = [0] * 5
    for seed in range(draws):
        counts[next(generate(model, [2, 1], tokens=1, temperature=2.0, seed=seed))] += 1
    chi_square = sum((n - draws * p) ** 2 / (draws * p) for n, p in zip(counts, probabilities.tolist(), strict=True))
    assert chi_square < 23.5, counts  # 4 degrees of freedom: exceeded once in 10,000


def test_ids_beyond_the_vocabulary_are_never_drawn() -> None:
    model = GPT(GPTConfig(vocab_size=50, context=4, layers=1, heads=1, dim=8))
    drawn = set(generate(model, [1], tokens=60, temperature=50.0, vocab_size=3))
    assert drawn == {0, 1, 2}
    assert max(generate(model, [1], tokens=60, temperature=50.0)) > 2
    assert set(generate(model, [1], tokens=20, temperature=50.0, top_k=1000, vocab_size=3)) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt must hold at least one token"),
        ([3, 256], {}, r"ids must lie in \[0, 256\), got 256"),
        ([-1], {}, r"ids must lie in \[0, 256\)"),
        ([1], {"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ([1], {"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_generation_refuses(run: Path, prompt: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(generate(load(run).model, prompt, tokens=3, **options))  # type: ignore[arg-type]


def test_nothing_is_computed_before_it_is_asked_for(run: Path) -> None:
    assert list(generate(load(run).model, [1], tokens=0)) == []
    assert len(list(islice(generate(load(run).model, [1], tokens=10**9), 2))) == 2


def test_a_model_of_more_rows_than_ids(source: Path, tmp_path: Path) -> None:
    """Padding of the embedding is kept with the run, and refused where it is too small."""
    quietly(config(source, steps=2, model={"vocab_size": 300}), tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.model.embedding.weight.shape == (300, 16)
    with pytest.raises(UserError, match=r"model\.vocab_size must be at least the corpus's 256, got 255"):
        quietly(config(source, model={"vocab_size": 255}), tmp_path / "small")
    assert not (tmp_path / "small").exists()
    assert replace(loaded.model.config, vocab_size=None) == config(source).model

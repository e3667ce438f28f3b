"""The loss of a large vocabulary, in parts: the dense formula's value and gradients, and never all logits at once."""

import pytest
import torch
from torch import Tensor

from deepdelta import GPT
from deepdelta.lab.measure.memory import peak_bytes
from deepdelta.models import GPTConfig, gpt, language_model
from deepdelta.models.gpt import head_loss, label_loss
from deepdelta.training import Evaluation, evaluate
from helpers import randn


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 61 numbers: for a vocabulary of 17 three tokens at a time, with an odd one at the end."""
    monkeypatch.setattr(gpt, "WHOLE_LOGITS", 100)
    monkeypatch.setattr(gpt, "PART_OF_LOGITS", 61)


def dense(c_BTD: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log softmax at the labels that count, written out in fp64."""
    logits = c_BTD.double().flatten(0, 1) @ weight.double().T
    chosen = [i for i, label in enumerate(labels.flatten().tolist()) if label >= 0]
    shifted = logits - logits.max(1, keepdim=True).values.detach()
    picked = [shifted[i, labels.flatten()[i]] - shifted[i].exp().sum().log() for i in chosen]
    return -torch.stack(picked).mean() if picked else 0 * logits.sum()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5), (3, 7), (1, 13)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_value_and_gradients_are_those_of_the_dense_formula(
    batch: int, tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    c, weight = randn(batch, tokens, 6).to(dtype), randn(17, 6, seed=1).to(dtype)
    labels = torch.randint(0, 17, (batch, tokens), generator=torch.Generator().manual_seed(0))
    for ignored in (None, -1, -100):
        if ignored is not None:
            labels.flatten()[:: 2 if ignored == -1 else 1] = ignored  # at last all of them
        results = []
        for function in (head_loss, dense):
            leaves = [tensor.clone().requires_grad_() for tensor in (c, weight)]
            loss = function(*leaves, labels)
            results.append([loss, *torch.autograd.grad(1.7 * loss, leaves)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("rival", [None, "gated-multi"])
def test_the_models_loss_alone(rival: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 17, "context": 8, "layers": 1, "heads": 2, "dim": 8, "rival": rival}
    model = language_model(GPTConfig(**sizes)).double()  # type: ignore[arg-type]
    ids = torch.randint(0, 17, (3, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for alone in (True, False):
        model.zero_grad()
        logits, loss = model(ids[:, :-1], ids[:, 1:], loss_alone=alone)
        assert (logits is None) == alone
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_below_the_limit_not_a_bit_changes() -> None:
    c, weight, labels = randn(2, 5, 6).float(), randn(17, 6, seed=1).float(), torch.arange(10).view(2, 5)
    results = []
    for function in (head_loss, lambda c, w, labels: label_loss(c @ w.T, labels)):
        leaves = [tensor.clone().requires_grad_() for tensor in (c, weight)]
        loss = function(*leaves, labels)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("backward", [True, False])
def test_the_logits_never_stand_whole(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All allocations counted: with a sixteenth of the logits at a time less than all of them in fp32 stand at once."""
    tokens, vocabulary = (2, 128), 2048
    logits = 256 * vocabulary
    c, weight, labels = randn(*tokens, 8).float(), randn(vocabulary, 8, seed=1).float(), torch.zeros(tokens).long()

    def step() -> None:
        with torch.set_grad_enabled(backward):
            loss = head_loss(c.requires_grad_(backward), weight.requires_grad_(backward), labels)
            if backward:
                torch.autograd.grad(loss, [c, weight])

    assert peak_bytes(step, []) >= 2 * 4 * logits  # whole, with what cross-entropy makes of them
    monkeypatch.setattr(gpt, "WHOLE_LOGITS", logits - 1)
    monkeypatch.setattr(gpt, "PART_OF_LOGITS", logits // 16)
    assert peak_bytes(step, []) < 4 * logits / 2


def test_a_model_of_a_large_vocabulary_is_evaluated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepdelta.data import Corpus

    ids = torch.randint(0, 17, (100,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    corpus = Corpus.__new__(Corpus)
    object.__setattr__(corpus, "validation", ids)
    for name in ("check_mapped", "check_unchanged"):
        monkeypatch.setattr(Corpus, name, lambda self: None)
    model = GPT(GPTConfig(vocab_size=17, context=8, layers=1, heads=2, dim=8))
    found: list[Evaluation] = []
    for whole in (1 << 26, 100):
        monkeypatch.setattr(gpt, "WHOLE_LOGITS", whole)
        monkeypatch.setattr(gpt, "PART_OF_LOGITS", min(whole, 61))
        found.append(evaluate(model, corpus, batch_size=3, device=torch.device("cpu")))
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-6) and found[0].tokens == found[1].tokens == 99

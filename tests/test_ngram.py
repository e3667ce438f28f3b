"""Counted n-grams against the formula written out with dictionaries, and as the row of a study."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdelta.data import DataConfig, batch, load_corpus, spread
from deepdelta.errors import UserError
from deepdelta.lab.experiments.collection import counted
from deepdelta.lab.measure.ngram import WittenBell
from deepdelta.models import GPTConfig
from deepdelta.training import TrainConfig


def written_out(windows, order, vocabulary, window):
    """P of each id of a window but the first, from the recursion itself."""
    counts, after = Counter(), defaultdict(Counter)
    for own in windows:
        for end in range(len(own)):
            for length in range(min(order, end + 1)):
                after[tuple(own[end - length : end])][own[end]] += 1
    counts.update({history: sum(next_ids.values()) for history, next_ids in after.items()})

    def p(word, history):
        low = p(word, history[1:]) if history else 1 / vocabulary
        kinds = len(after[history])
        return low if not kinds else (after[history][word] + kinds * low) / (counts[history] + kinds)

    return [p(window[i], tuple(window[max(0, i - order + 1) : i])) for i in range(1, len(window))]


ids = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(ids, max_size=4), st.lists(st.integers(0, 4), min_size=2, max_size=9), st.integers(1, 4))
def test_probabilities_are_the_recursion_s(windows, window, order):
    model = WittenBell(map(np.array, windows), order=order, vocabulary=5)
    np.testing.assert_allclose(
        model.probabilities(np.array(window)), written_out(windows, order, 5, window), rtol=1e-13
    )


def test_probabilities_of_all_next_ids_add_up_to_one_also_after_what_never_came():
    generator = np.random.default_rng(0)
    model = WittenBell([generator.integers(0, 6, 300)], order=4, vocabulary=7)
    for history in ([0, 1, 2], [6, 6, 6], [1, 6, 3], [5]):
        total = sum(model.probabilities(np.array([*history, word]))[-1] for word in range(7))
        assert total == pytest.approx(1, abs=1e-12)


def test_a_repeated_text_is_learned_and_another_one_is_not():
    text = np.arange(2000) % 11
    model = WittenBell([text], order=3, vocabulary=256)
    assert model.loss([text[:500]]) < 0.01
    assert model.loss([text[:500][::-1].copy()]) > 3


def test_grams_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="5-grams of 50,257 ids do not fit into 63 bits; at most 4"):
        WittenBell([np.arange(9)], order=5, vocabulary=50257)


def test_a_study_counts_what_its_runs_read_and_asks_on_their_windows(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60 + "a dog lay on the rug; " * 50)
    source = DataConfig(source=str(tmp_path / "text.txt"))
    model = GPTConfig(dim=8, layers=1, heads=1, context=16)
    settings_ = TrainConfig(model=model, data=source, steps=3, batch_size=2, accumulate=2, final_eval_tokens=48)
    corpus = load_corpus(source, cache=tmp_path / "cache")
    found = counted(settings_, corpus, [4, 5])
    assert found is not None and found.order == 5
    read = {}
    for seed in (4, 5):
        pairs = [batch(corpus.train, seed=seed, step=s, batch_size=4, context=16) for s in range(3)]
        read[seed] = [[*x, y[-1]] for xs, ys in pairs for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
    asked = spread(corpus.validation, context=16, limit=48).tolist()
    for seed, windows in read.items():
        logs = [np.log(p) for window in asked for p in written_out(windows, 5, 256, window)]
        assert found.losses[seed] == pytest.approx(-np.mean(logs), rel=1e-12)
    assert found.losses[4] != found.losses[5]
    assert counted(replace(settings_, steps=10**6), corpus, [4]) is None
    assert counted(replace(settings_, model=replace(model, vocab_size=8192)), corpus, [4]) is None

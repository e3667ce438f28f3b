"""Batches: purity in (seed, step), the stated positions, and exact coverage by evaluation windows."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepdelta.data import IGNORED, DataConfig, batch, load_corpus, window_count, windows
from deepdelta.errors import UserError

WORD = (1 << 64) - 1


def philox(seed: int, step: int, count: int) -> list[int]:
    """Philox 4x64 with 10 rounds as Salmon et al. (2011) give it; numpy adds 1 to the counter before each block."""
    numbers: list[int] = []
    while len(numbers) < count:
        c = [len(numbers) // 4 + 1, 0, 0, 0]
        k = [seed, step]
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(b >> 64) ^ c[1] ^ k[0], b & WORD, (a >> 64) ^ c[3] ^ k[1], a & WORD]
            k = [(k[0] + 0x9E3779B97F4A7C15) & WORD, (k[1] + 0xBB67AE8584CAA73B) & WORD]
        numbers += c
    return numbers[:count]


@given(
    seed=st.integers(0, WORD),
    step=st.integers(0, WORD),
    size=st.integers(1, 9),
    context=st.integers(1, 7),
    extra=st.integers(1, 400),
)
def test_windows_lie_where_an_own_philox_puts_them(seed: int, step: int, size: int, context: int, extra: int) -> None:
    tokens = np.arange(context + extra, dtype=np.uint16)  # a token's value is its position
    inputs, labels = batch(tokens, seed=seed, step=step, batch_size=size, context=context)
    starts = [number % extra for number in philox(seed, step, size)]
    assert inputs.tolist() == [list(range(start, start + context)) for start in starts]
    assert labels.tolist() == [list(range(start + 1, start + context + 1)) for start in starts]
    assert inputs.is_contiguous() and labels.is_contiguous()


def test_batch_ignores_and_leaves_alone_all_global_random_state() -> None:
    tokens = np.arange(1000, dtype=np.uint16)

    def draw() -> torch.Tensor:
        return batch(tokens, seed=3, step=5, batch_size=4, context=8)[0]

    torch.manual_seed(1)
    np.random.seed(1)
    before, states = draw(), (torch.get_rng_state(), np.random.get_state()[1].tolist())
    again = draw()
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(before, again) and torch.equal(before, draw())


def test_another_seed_or_step_is_another_batch() -> None:
    tokens = np.arange(60000, dtype=np.uint16)
    keys = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (2, 0)]
    starts = {tuple(batch(tokens, seed=a, step=b, batch_size=3, context=2)[0][:, 0].tolist()) for a, b in keys}
    assert len(starts) == len(keys)


def test_a_fresh_process_draws_the_same_batch() -> None:
    code = (
        "import hashlib, numpy as np; from deepdelta.data import batch\n"
        "x, y = batch(np.arange(999, dtype=np.uint16), seed=7, step=11, batch_size=6, context=5)\n"
        "print(hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest())"
    )
    x, y = batch(np.arange(999, dtype=np.uint16), seed=7, step=11, batch_size=6, context=5)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()


def test_every_window_can_be_drawn_and_no_other() -> None:
    tokens = np.arange(12, dtype=np.uint8)
    counts = np.zeros(12, int)
    for step in range(250):
        inputs, labels = batch(tokens, seed=0, step=step, batch_size=16, context=8)
        assert torch.equal(labels, inputs + 1)
        counts += np.bincount(inputs[:, 0].numpy(), minlength=12)
    assert counts[4:].sum() == 0
    # 4,000 draws of 4 equally likely windows: the standard deviation of each count is sqrt(4000 * 1/4 * 3/4) = 27.
    assert np.all(np.abs(counts[:4] - 1000) < 5 * 27)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_ids_of_every_width_arrive_whole(dtype: type[np.unsignedinteger]) -> None:
    largest = int(np.iinfo(dtype).max)
    tokens = np.full(10, largest, dtype)
    inputs, labels = batch(tokens, seed=0, step=0, batch_size=2, context=9)
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.unique().tolist() == labels.unique().tolist() == [largest]
    assert next(iter(windows(tokens, context=9, batch_size=2)))[0].tolist() == [[largest] * 9]


@given(count=st.integers(0, 200), context=st.integers(1, 40), batch_size=st.integers(1, 7))
def test_evaluation_predicts_every_token_but_the_first_exactly_once(count: int, context: int, batch_size: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    predicted: list[int] = []
    rows = 0
    for inputs, labels in windows(tokens, context=context, batch_size=batch_size):
        assert inputs.shape == labels.shape and inputs.shape[1] == context and 1 <= len(inputs) <= batch_size
        real = labels != IGNORED
        assert torch.equal(labels[real], inputs[real] + 1)  # the label is the token after its input
        assert not inputs[~real].any()
        predicted += labels[real].tolist()
        rows += len(inputs)
    assert predicted == list(range(1, count))
    assert rows == window_count(tokens, context=context) == math.ceil(max(count - 1, 0) / context)


def test_only_the_last_window_is_filled_up_and_at_its_end() -> None:
    (inputs, labels), (last_inputs, last_labels) = windows(np.arange(5, 12, dtype=np.uint8), context=2, batch_size=2)
    assert inputs.tolist() == [[5, 6], [7, 8]] and labels.tolist() == [[6, 7], [8, 9]]
    assert last_inputs.tolist() == [[9, 10]] and last_labels.tolist() == [[10, 11]]
    ((inputs, labels),) = windows(np.arange(5, 8, dtype=np.uint8), context=3, batch_size=2)
    assert inputs.tolist() == [[5, 6, 0]] and labels.tolist() == [[6, 7, -1]]


@pytest.mark.parametrize("context", [1, 5, 40])
def test_windows_that_end_with_their_document(context: int) -> None:
    tokens = np.random.default_rng(3).integers(0, 7, 500).astype("<u2")
    drawn = {"seed": 1, "step": 2, "batch_size": 60, "context": context}
    inputs, labels = batch(tokens, **drawn)
    kept, ended = batch(tokens, **drawn, ends_at=0)
    assert kept.equal(inputs)
    for row, cut in zip(labels.tolist(), ended.tolist(), strict=True):
        end = row.index(0) + 1 if 0 in row else len(row)
        assert cut == row[:end] + [IGNORED] * (len(row) - end) and cut[0] != IGNORED


def test_documents_end_at_the_tokenizer_s_separator(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{i} some text")
    for kind, end in (("joined", None), ("documents", 0)):
        config = DataConfig(source=str(tmp_path), windows=kind)
        assert load_corpus(config, cache=tmp_path.parent / "cache").ends_at == end
    np.arange(90, dtype="<u2").tofile(tmp_path.parent / "ids.bin")
    with pytest.raises(UserError, match="windows='documents' needs the tokenizer that wrote the ids"):
        load_corpus(DataConfig(source=str(tmp_path.parent / "ids.bin"), windows="documents"))

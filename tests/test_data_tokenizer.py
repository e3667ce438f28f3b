"""Tokenizers: round trips, streams that never show a broken character, saving and loading."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from deepdelta.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from deepdelta.data.tokenizer import _without_long_words
from deepdelta.errors import UserError

BYTES = ByteTokenizer()
BPE = BPETokenizer.train(["def method(self):\n    return größe €5 日本語 😀\n"] * 20, vocab_size=320)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


@BOTH
@given(text=st.text(max_size=60))
def test_text_comes_back_from_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= one < tokenizer.vocab_size for one in ids)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text


@BOTH
@given(data=st.data())
def test_stream_of_any_ids_joins_to_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    pieces = list(tokenizer.stream(ids))
    assert all(pieces)
    assert "".join(pieces) == tokenizer.decode(ids)


@BOTH
@given(text=st.text(alphabet="aé€日😀𐍈 ", min_size=1, max_size=20))
def test_stream_shows_characters_whole_and_as_soon_as_they_are(tokenizer: Tokenizer, text: str) -> None:
    seen: list[int] = []
    shown = ""

    def ids_one_by_one():  # type: ignore[no-untyped-def]
        for one in tokenizer.encode(text):
            seen.append(one)
            yield one

    for piece in tokenizer.stream(ids_one_by_one()):
        assert "\ufffd" not in piece
        shown += piece
        assert shown == tokenizer.decode(seen).rstrip("\ufffd")
    assert shown == text


def test_a_character_cut_off_at_the_end_is_shown_as_broken() -> None:
    for tokenizer in (BYTES, BPE):
        ids = [*tokenizer.encode("ok "), *tokenizer.encode("𐍈")[:-1]]
        assert len(tokenizer.encode("𐍈")) == 4  # not merged: one id per byte
        assert list(tokenizer.stream(ids))[-1] == "\ufffd" and tokenizer.decode(ids) == "ok \ufffd"


def test_a_decoder_that_treats_the_first_id_apart_streams_as_it_decodes(tmp_path: Path) -> None:
    words = {"<|endoftext|>": 0, "▁hello": 1, "▁wide": 2, "▁world": 3}
    plain = {
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.decode([1, 2, 3]) == "hello wide world"
    assert list(tokenizer.stream([1, 2, 3])) == ["hello", " wide", " world"]


def test_a_separator_spelled_out_in_text_ends_no_document() -> None:
    ids = BPE.encode("before<|endoftext|>after")
    assert BPE.separator not in ids and BPE.decode(ids) == "before<|endoftext|>after"
    assert BPE.decode([BPE.separator]) == "<|endoftext|>"
    assert BYTES.separator == 0 and BYTES.encode("\0") == [0]


def test_bpe_merges_and_keeps_to_its_size() -> None:
    assert 257 < BPE.vocab_size <= 320
    assert len(BPE.encode("def method(self):")) < len("def method(self):") / 2


@BOTH
def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.vocab_size == tokenizer.vocab_size and loaded.separator == tokenizer.separator
    text = "def größe<|endoftext|> 😀\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    tokenizer.save(tmp_path)  # replaces


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "must hold a JSON object, but is damaged"),
        (b"\xff", "must hold a JSON object, but is damaged"),
        (b"{}", "must be a JSON file that the `tokenizers` library wrote; it says: Model missing"),
        (
            Library(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode(),
            r"must hold a token that stands between documents, <\|endoftext\|>, .*: name the one that it has",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@given(runs=st.lists(st.tuples(st.sampled_from("a€7 \n=_"), st.integers(1, 3000)), max_size=5))
def test_no_word_handed_to_the_training_is_long(runs: list[tuple[str, int]]) -> None:
    text = "".join(letter * count for letter, count in runs)
    pieces = list(_without_long_words(text))
    assert "".join(pieces) == text
    # A run is cut at each multiple of 512 at whose left 512 characters of it lie.
    assert all(
        run.end() - run.start() < 2 * 512 for piece in pieces for run in re.finditer(r"(.)\1*", piece, re.DOTALL)
    )


def test_text_with_words_below_512_characters_is_trained_on_as_it_is() -> None:
    text = "".join(f"{'ab' * n} {'x1' * 900} {'=' * (500 - n)}\n" for n in range(1, 250, 7)) + " " * 511
    assert list(_without_long_words(text)) == [text]
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert BPETokenizer.train([text], vocab_size=300).encode(text) == library.encode(text).ids


def test_text_without_spaces_comes_back() -> None:
    text = "".join(random.Random(0).choice("acgt") for _ in range(20_000))
    tokenizer = BPETokenizer.train([text], vocab_size=300)
    assert len(tokenizer.encode(text)) < len(text) / 2 and tokenizer.decode(tokenizer.encode(text)) == text

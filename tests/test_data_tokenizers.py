"""Tokenizers that others made: of SentencePiece's kind, BERT's, files of an Auto tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from deepdelta import generate, load
from deepdelta.cli import main
from deepdelta.data import BPETokenizer, DataConfig, load_corpus, load_tokenizer
from deepdelta.data.tokenizer import read_tokenizer
from deepdelta.errors import UserError
from deepdelta.exporting import export
from tiny_runs import config, quietly

TEXTS = [f"the größe of document {i}, €{i} and 日本 {'more ' * (i % 5)}of it" for i in range(60)]


def sentencepiece() -> Library:
    """As Llama's: spaces are written, unknown characters are tokens of bytes."""
    made = Library(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, limit_alphabet=40, show_progress=False, initial_alphabet=["▁"]
    )
    made.train_from_iterator(TEXTS, trainer)
    plain = json.loads(made.to_str())
    plain["added_tokens"] = [one for one in plain["added_tokens"] if not one["content"].startswith("<0x")]
    made = Library.from_str(json.dumps(plain))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


def bert() -> Library:
    made = Library(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.enable_truncation(5)
    made.enable_padding(length=9)
    return made


def of(made: str, **more: Any) -> BPETokenizer:
    return BPETokenizer(made, where="it", **more)


# Two that are trained alike are not the same.
PIECES, WORDS = sentencepiece().to_str(), bert().to_str()
LLAMA, BERT = of(PIECES), of(WORDS)


def test_what_ends_their_texts_stands_between_documents():
    assert LLAMA.separator_token == "</s>" and LLAMA.decode([LLAMA.separator]) == "</s>"
    assert BERT.separator_token == "[SEP]" and BERT.decode([BERT.separator]) == "[SEP]"
    made = Library.from_str(PIECES)
    made.add_special_tokens(["<end>", "<|end_of_text|>"])
    assert of(made.to_str(), end="<end>").separator_token == "<|end_of_text|>"
    assert of(PIECES, end="<s>").separator_token == "<s>"
    assert len({of(PIECES, end=end).sha256 for end in ("<s>", "</s>", None)}) == 2
    assert LLAMA.separator not in LLAMA.encode("a</s>b")


def test_text_is_encoded_whole_as_the_library_does():
    plain = Library.from_str(WORDS)
    plain.no_truncation()
    plain.no_padding()
    assert len(BERT.encode(TEXTS[4])) > 9 and BERT.encode(TEXTS[4]) == plain.encode(TEXTS[4]).ids
    assert BERT.encode_all(TEXTS) == [plain.encode(text).ids for text in TEXTS]
    assert all(LLAMA.decode(LLAMA.encode(text)) == text for text in (*TEXTS, "😀 unseen Ωé"))


@pytest.mark.parametrize("tokenizer", [LLAMA, BERT], ids=["llama", "bert"])
@given(data=st.data())
def test_stream_of_any_ids_joins_to_decode(tokenizer: BPETokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    pieces = list(tokenizer.stream(ids))
    assert all(pieces) and "".join(pieces) == tokenizer.decode(ids)


@given(text=st.text(alphabet="aé€日😀 ", max_size=20))
def test_a_stream_never_shows_a_character_in_parts(text: str) -> None:
    assert "\ufffd" not in "".join(LLAMA.stream(LLAMA.encode(text)))


@pytest.mark.parametrize("end", ["</s>", "<s>"])
def test_saved_and_loaded_is_the_same(tmp_path: Path, end: str) -> None:
    tokenizer = of(PIECES, end=end)
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": end}
    for again in (load_tokenizer(tmp_path), read_tokenizer(tmp_path), read_tokenizer(tmp_path / "tokenizer.json")):
        assert again is not None and (again.sha256, again.separator) == (tokenizer.sha256, tokenizer.separator)
        assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("record", [False, True])
def test_the_settings_beside_it_say_what_ends_texts(tmp_path: Path, record: bool) -> None:
    made = Library(models.WordLevel({"<end>": 0, "a": 1}, unk_token="a"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"name the one that it has as eos_token in a tokenizer_config.json beside it"):
        read_tokenizer(tmp_path)
    named = {"eos_token": {"content": "<end>", "special": True} if record else "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert read_tokenizer(tmp_path).separator == 0


def test_files_of_an_auto_tokenizer(tmp_path: Path) -> None:
    """GPT-2's own two, which hold no tokenizer.json."""
    made = BPETokenizer.train(TEXTS, vocab_size=320)
    made.save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    found = read_tokenizer(folder)
    assert [found.encode(text) for text in TEXTS] == [made.encode(text) for text in TEXTS]
    assert found.separator == made.separator
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer could be made of .*; give a folder with a tokenizer.json"):
        read_tokenizer(folder)


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr("deepdelta.data.hub.reachable", lambda address: bool(asked.append(address)))
    with pytest.raises(
        UserError, match=r"no tokenizer could be made of no-one/nothing .*; without a network, place its"
    ):
        load_corpus(DataConfig(source="stdlib", tokenizer="hf://no-one/nothing"), cache=tmp_path)
    assert len(asked) == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.compatible("a tokenizer that ends texts with </s>: prepare, train, generate, export", "tokenizers")
def test_from_a_folder_of_text_to_generated_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, own = tmp_path / "texts", tmp_path / "own"
    for folder in (texts, own):
        folder.mkdir()
    for i, text in enumerate(TEXTS):
        (texts / f"{i}.txt").write_text(text)
    LLAMA.save(own)
    main(
        [
            "prepare",
            str(texts),
            "--out",
            str(tmp_path / "shards"),
            "--tokenizer",
            str(own),
            "--validation-fraction",
            "0.3",
        ]
    )
    prepared = load_corpus(
        DataConfig(source=str(tmp_path / "shards"), tokenizer=str(tmp_path / "shards/tokenizer.json"))
    )
    assert prepared.tokenizer is not None and prepared.tokenizer.sha256 == LLAMA.sha256
    assert prepared.train[0] == LLAMA.separator
    quietly(config(texts, data={"tokenizer": str(own), "windows": "documents"}, model={"context": 8}), tmp_path / "run")
    capsys.readouterr()
    main(["generate", str(tmp_path / "run"), "--prompt", "the größe", "--tokens", "6", "--temperature", "0"])
    model, tokenizer = load(tmp_path / "run")
    assert tokenizer is not None and tokenizer.sha256 == LLAMA.sha256
    drawn = generate(model, tokenizer.encode("the größe"), tokens=6, temperature=0.0)
    assert capsys.readouterr().out == "the größe" + "".join(tokenizer.stream(drawn)) + "\n"
    exported = export(tmp_path / "run", "hf", tmp_path / "hf")
    assert json.loads((exported / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == LLAMA.separator

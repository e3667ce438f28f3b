"""Text to ids and back: bytes as they are, or a byte-level BPE of the `tokenizers` library."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepdelta.errors import UserError
from deepdelta.files import AnyPath, read_plain, write_text
from deepdelta.ids import Ids, id_list

SEPARATOR = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
_BYTES_FILE = {"deepdelta_tokenizer": "bytes"}

_LONG = 512
# Letters, digits, spaces or other characters alone: the words that the byte-level BPE splits text into are such runs.
_RUN = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")


@runtime_checkable
class Tokenizer(Protocol):
    """What turns text into ids and ids into text."""

    @property
    def vocab_size(self) -> int:
        """Every id is smaller than this."""

    @property
    def separator(self) -> int:
        """The id that stands between two documents, and before the first text when generating from nothing."""

    @property
    def sha256(self) -> str:
        """Of the definition: equal tokenizers have equal hashes."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; a separator spelled out in it is ordinary text."""

    def decode(self, ids: Ids) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` in pieces as they come: joined they are `decode` of all ids.

        A character spread over several ids is held back until it is complete.
        """

    def save(self, folder: AnyPath) -> None:
        """Write `tokenizer.json` into the existing `folder`, atomically."""


class ByteTokenizer:
    """The 256 bytes of UTF-8 as ids. The separator is the NUL byte, which text does not contain."""

    vocab_size = 256
    separator = 0
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Ids) -> str:
        return bytes(id_list(ids, "ids")).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for one in ids:
            if piece := decoder.decode(bytes([one])):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def save(self, folder: AnyPath) -> None:
        write_text(Path(folder) / FILE_NAME, json.dumps(_BYTES_FILE) + "\n")


class BPETokenizer:
    """A tokenizer of the `tokenizers` library with the token `<|endoftext|>` between documents.

    Args:
        definition: its JSON, as `tokenizers` writes it.
        where: how messages name the place that the definition came from.

    Raises:
        UserError: `tokenizers` cannot read the definition, or it lacks `<|endoftext|>`.
    """

    def __init__(self, definition: str, *, where: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # `tokenizers` raises this bare class, and no other, for a bad definition
            raise UserError(
                f"{where} must be a JSON file that the `tokenizers` library wrote; it says: {error}."
            ) from error
        separator = self._tokenizer.token_to_id(SEPARATOR)
        if separator is None:
            raise UserError(
                f"{where} must hold the token {SEPARATOR}, which stands between documents: add it with "
                f"Tokenizer.add_special_tokens(['{SEPARATOR}']) and save the file again."
            )
        self.separator: int = separator
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        self.sha256: str = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()
        # A document that spells the separator out must not end there.
        self._tokenizer.encode_special_tokens = True

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, show_progress: bool = False) -> "BPETokenizer":
        """A byte-level BPE of at most `vocab_size` ids, trained on `texts`; it encodes every text without loss.

        The time that `tokenizers` needs is quadratic in the length of a word. So text without spaces (DNA, one long
        number) is cut every 512 characters before it is trained on. Words below 512 characters are never cut.

        Args:
            show_progress: show a bar of `tokenizers` on a terminal.
        """
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        )
        trained.train_from_iterator((piece for text in texts for piece in _without_long_words(text)), trainer)
        return cls(trained.to_str(), where="the trained BPE")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [one.ids for one in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(id_list(ids, "ids"), skip_special_tokens=False)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        # Only the last U+FFFD of a decoded text can change when more ids come: an unfinished character decodes to
        # exactly one. The ids of the piece before stay as context, for decoders that treat the first id apart.
        before: list[int] = []
        now: list[int] = []
        shown = 0
        for one in ids:
            now.append(one)
            text = self.decode(before + now)
            sure = text.removesuffix("\ufffd")
            if len(sure) > shown:
                yield sure[shown:]
                shown = len(sure)
            if sure == text:
                before, now = now, []
                shown = len(self.decode(before))
        if rest := self.decode(before + now)[shown:]:
            yield rest

    def save(self, folder: AnyPath) -> None:
        write_text(Path(folder) / FILE_NAME, self._tokenizer.to_str())


def _without_long_words(text: str) -> Iterator[str]:
    """The text in pieces, cut at each multiple of `_LONG` characters that ends as many of one run."""
    start = 0
    for end in range(_LONG, len(text), _LONG):
        if _RUN.fullmatch(text, end - _LONG, end):
            yield text[start:end]
            start = end
    yield text[start:]


def read_tokenizer(path: AnyPath) -> Tokenizer:
    """The tokenizer that the JSON file `path` defines.

    Raises:
        UserError: there is no such file, or it defines no tokenizer.
    """
    plain = read_plain(Path(path), "give a file that the `tokenizers` library wrote")
    return ByteTokenizer() if plain == _BYTES_FILE else BPETokenizer(json.dumps(plain), where=str(path))


def load_tokenizer(folder: AnyPath) -> Tokenizer | None:
    """The tokenizer saved in `folder`; None where none was, as for a corpus of bare ids.

    Raises:
        UserError: the file there defines no tokenizer.
    """
    path = Path(folder) / FILE_NAME
    return read_tokenizer(path) if path.exists() else None

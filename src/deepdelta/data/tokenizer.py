"""Text to ids and back: bytes as they are, or any tokenizer of the `tokenizers` library."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepdelta.data.hub import ON_HUB, offline_without_network
from deepdelta.errors import UserError, require
from deepdelta.files import AnyPath, read_object, read_plain, write_json, write_text
from deepdelta.ids import Ids, id_list

SEPARATOR = "<|endoftext|>"
FILE_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
_BYTES_FILE = {"deepdelta_tokenizer": "bytes"}
_SEPARATORS = (SEPARATOR, "<|end_of_text|>")
_ENDS = ("</s>", "<eos>", "[SEP]")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""How tokenizers of SentencePiece name a byte of a character that they have no token for."""

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
    """A tokenizer of the `tokenizers` library, with one of its tokens between documents.

    Args:
        definition: its JSON, as `tokenizers` writes it.
        where: how messages name the place that the definition came from.
        end: the token that it ends texts with, as far as its settings say that.

    The token between documents is `<|endoftext|>` or `<|end_of_text|>` where there is one, else `end`, else what is
    known as such: `</s>`, `<eos>`, `[SEP]`.

    Raises:
        UserError: `tokenizers` cannot read the definition, or it has none of these tokens.
    """

    def __init__(self, definition: str, *, where: str, end: str | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # `tokenizers` raises this bare class, and no other, for a bad definition
            raise UserError(
                f"{where} must be a JSON file that the `tokenizers` library wrote; it says: {error}."
            ) from error
        # Files of models say how much these take at once, and documents are longer.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        candidates = (*_SEPARATORS, *([] if end is None else [end]), *_ENDS)
        held = [(token, number) for token in candidates if (number := self._tokenizer.token_to_id(token)) is not None]
        if not held:
            raise UserError(
                f"{where} must hold a token that stands between documents, {', '.join(candidates)}: name the one that "
                f"it has as eos_token in a {CONFIG_NAME} beside it, or add one with "
                f"Tokenizer.add_special_tokens(['{SEPARATOR}']) and save the file again."
            )
        self.separator_token, self.separator = held[0]
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        named = "" if self.separator_token == SEPARATOR else self.separator_token
        self.sha256: str = hashlib.sha256((self._tokenizer.to_str() + named).encode()).hexdigest()
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
        # exactly one. The ids of the piece before stay as context, for decoders that treat the first id apart. A row of
        # tokens that are bytes may still turn to U+FFFD as a whole, one for each.
        before: list[int] = []
        now: list[int] = []
        shown = 0
        for one in ids:
            now.append(one)
            if _BYTE.fullmatch(self._tokenizer.id_to_token(one) or ""):
                continue
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
        if self.separator_token != SEPARATOR:
            write_json(Path(folder) / CONFIG_NAME, {"eos_token": self.separator_token})
        write_text(Path(folder) / FILE_NAME, self._tokenizer.to_str())


def _without_long_words(text: str) -> Iterator[str]:
    """The text in pieces, cut at each multiple of `_LONG` characters that ends as many of one run."""
    start = 0
    for end in range(_LONG, len(text), _LONG):
        if _RUN.fullmatch(text, end - _LONG, end):
            yield text[start:end]
            start = end
    yield text[start:]


def read_tokenizer(source: AnyPath) -> Tokenizer:
    """The tokenizer that a JSON file defines, a folder holds or the Hugging Face hub has.

    Args:
        source: a file that `tokenizers` wrote; a folder with a tokenizer.json or with the other files of which
            transformers' AutoTokenizer makes a tokenizer; or hf://OWNER/NAME. Beside a tokenizer.json, the
            tokenizer_config.json may say which token ends texts (eos_token).

    Raises:
        UserError: there is no such file or folder, or it defines no tokenizer; the extra `hf` is needed and absent; the
            hub cannot be reached.
    """
    if str(source).startswith(ON_HUB):
        return _auto(str(source).removeprefix(ON_HUB))
    path = Path(source)
    if path.is_dir():
        if not (path / FILE_NAME).exists():
            return _auto(path)
        path /= FILE_NAME
    plain = read_plain(path, "give a file that the `tokenizers` library wrote")
    settings = path.with_name(CONFIG_NAME)
    told = read_object(settings, "mend it, or remove it") if path.name == FILE_NAME and settings.exists() else {}
    # A token is text, or a record with its text.
    ends = [end["content"] if isinstance(end, dict) else end for end in map(told.get, ("eos_token", "sep_token"))]
    end = next((str(one) for one in ends if one), None)
    return ByteTokenizer() if plain == _BYTES_FILE else BPETokenizer(json.dumps(plain), where=str(path), end=end)


def _auto(source: AnyPath) -> Tokenizer:
    """What AutoTokenizer of transformers makes of a folder, or of a name on the hub."""
    require("Tokenizers in other files than tokenizer.json", "hf", "transformers")
    from transformers import AutoTokenizer

    try:
        with offline_without_network():
            found: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        mend = (
            f"give a folder with a {FILE_NAME}"
            if isinstance(source, Path)
            else f"without a network, place its {FILE_NAME} and {CONFIG_NAME} from the Hugging Face hub in a folder "
            "and give that"
        )
        raise UserError(f"no tokenizer could be made of {source} ({type(error).__name__}: {first}); {mend}.") from error
    fast = getattr(found, "backend_tokenizer", None)
    if fast is None:
        raise UserError(
            f"the tokenizer of {source}, {type(found).__name__}, must be one of the `tokenizers` library, and is "
            "written in Python; give another."
        )
    return BPETokenizer(fast.to_str(), where=str(source), end=found.eos_token or found.sep_token)


def load_tokenizer(folder: AnyPath) -> Tokenizer | None:
    """The tokenizer saved in `folder`; None where none was, as for a corpus of bare ids.

    Raises:
        UserError: the file there defines no tokenizer.
    """
    path = Path(folder) / FILE_NAME
    return read_tokenizer(path) if path.exists() else None

"""Sources to two arrays of ids, memory-mapped: nothing here grows with the size of the corpus but time and disk."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt

from deepdelta.data.cache import built_once, default_cache, read_json, remembered
from deepdelta.data.config import DataConfig
from deepdelta.data.documents import Document, chunks, digest, texts
from deepdelta.data.sources import Listing, list_source, split_by_group
from deepdelta.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, read_tokenizer
from deepdelta.errors import UserError, nearest
from deepdelta.files import write_text

Progress = Callable[[str], None]
_FORMAT = 1  # part of the name of cached token files: raise it when what is written changes


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Text as ids, split for training and validation.

    Attributes:
        train, validation: the ids; read-only memory maps. Documents are joined by the tokenizer's separator.
        tokenizer: None where only ids are known.
        vocab_size: every id is smaller than this.
        sha256: of the raw documents, their names and their split; of the ids where the source is ids. It does not
            depend on the tokenizer. Results with different corpora are never compared.
        train_bytes, validation_bytes: bytes of text in each split, separators not counted; None where only ids are
            known.
        description: one line of plain English.
    """

    train: UInt[np.ndarray, " train_tokens"]
    validation: UInt[np.ndarray, " validation_tokens"]
    tokenizer: Tokenizer | None
    vocab_size: int
    sha256: str
    train_bytes: int | None
    validation_bytes: int | None
    description: str


def load_corpus(config: DataConfig, *, cache: Path | None = None, progress: Progress | None = None) -> Corpus:
    """The corpus that `config` describes.

    A single text file at byte level and `.bin` files are mapped where they lie. Everything else is encoded, document
    by document, into token files in the cache, where the next call finds them. Exact duplicates among the documents
    of a folder or of the standard library are dropped. Splits are fixed:

    - the standard library by top-level module or package, a folder by document: see `sources.split_by_group`;
    - a single text or `.bin` file by position: its end is validation. Text is cut at the start of a character;
    - train.bin and val.bin as they are.

    Args:
        cache: the folder for token files and for the hashes of large files; `default_cache()` if None.
        progress: called with a line of text before each slow step.

    Raises:
        UserError: the source is missing, empty, unreadable or cannot be split; text is not UTF-8 when BPE is asked;
            an id is beyond the vocabulary; the tokenizer is unknown; the cache cannot be written.
    """
    cache = cache or default_cache()
    say = progress or (lambda _: None)
    listing = list_source(config)
    given = _given_tokenizer(config, listing)
    hashes = _hashes(listing, cache, say)
    train, validation = _split(listing, hashes, config.validation_fraction)
    sha256 = _corpus_hash(train, validation, hashes)
    tokenizer: Tokenizer | None
    if listing.ids:
        tokenizer = given
        vocab_size = tokenizer.vocab_size if tokenizer else config.bin_vocab_size
        _check_ids(listing.documents, vocab_size, cache, say)
        maps = (_map(train[0], "<u2"), _map(validation[0], "<u2"))
    elif listing.split_by == "position" and isinstance(given, ByteTokenizer):
        tokenizer, vocab_size = given, given.vocab_size
        maps = (_map(train[0], "u1"), _map(validation[0], "u1"))
    else:
        folder = built_once(
            cache,
            f"{sha256}-{_tokenizer_key(config, given)}-{_FORMAT}",
            lambda folder: _encode(folder, train, validation, given, config.bpe_vocab_size, say),
        )
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        vocab_size = tokenizer.vocab_size
        maps = (_map_cached(folder, "train"), _map_cached(folder, "validation"))
    sizes = [sum(document.size for document in split) for split in (train, validation)]
    corpus = Corpus(
        train=maps[0],
        validation=maps[1],
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sha256=sha256,
        train_bytes=None if listing.ids else sizes[0],
        validation_bytes=None if listing.ids else sizes[1],
        description=_describe(listing, len(train) + len(validation), sizes, maps, vocab_size),
    )
    return corpus if config.held_out == "validation" else train_tail(corpus)


def train_tail(corpus: Corpus) -> Corpus:
    """The corpus without its validation part: the last tenth of the training ids, rounded up, is held out instead.

    The cut is one by position, so it may fall inside a document. Its `sha256` is the corpus's own, marked: losses on
    the tail compare with no loss on the validation part.
    """
    cut = len(corpus.train) * 9 // 10
    return replace(
        corpus,
        train=corpus.train[:cut],
        validation=corpus.train[cut:],
        sha256=hashlib.sha256(f"{corpus.sha256} train_tail".encode()).hexdigest(),
        train_bytes=None,
        validation_bytes=None,
        description=f"{corpus.description}; held out: the last {len(corpus.train) - cut:,} training tokens, "
        "the validation tokens unused",
    )


def check_context(corpus: Corpus, context: int) -> None:
    """Raise a UserError unless both splits hold a window of `context` tokens and the token after it."""
    for name, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= context:
            raise UserError(
                f"context must be smaller than the number of tokens in each split; it is {context:,} and the {name} "
                f"split has {len(tokens):,}. Lower the context or give more text."
            )


def _given_tokenizer(config: DataConfig, listing: Listing) -> Tokenizer | None:
    """The tokenizer as far as the configuration alone decides it; None for a BPE still to train and for bare ids."""
    if config.tokenizer == "bpe":
        if listing.ids:
            raise UserError(
                f"{listing.title}: a BPE cannot be trained on ids. Leave tokenizer at 'bytes' for bare ids, or set it "
                "to the `tokenizers` JSON file that wrote them."
            )
        return None
    if config.tokenizer == "bytes":
        return None if listing.ids else ByteTokenizer()
    path = Path(os.path.expanduser(config.tokenizer))
    if not path.is_file():
        raise UserError(
            f"tokenizer must be 'bytes', 'bpe' or the path of a `tokenizers` JSON file; there is no file "
            f"'{config.tokenizer}'; {nearest(config.tokenizer, ('bytes', 'bpe'))}"
        )
    return read_tokenizer(path)


def _hashes(listing: Listing, cache: Path, say: Progress) -> dict[Document, str]:
    def find() -> list[str]:
        say(f"Hashing {listing.title}: {sum(document.size for document in listing.documents):,} bytes.")
        return [digest(document) for document in listing.documents]

    return dict(zip(listing.documents, remembered(cache, "sha256", listing.documents, find), strict=True))


def _split(listing: Listing, hashes: dict[Document, str], fraction: float) -> tuple[list[Document], list[Document]]:
    if listing.split_by in ("position", "file"):
        train = [document for document in listing.documents if document.group == "train"]
        return train, [document for document in listing.documents if document.group == "validation"]
    first: dict[str, Document] = {}
    for document in listing.documents:
        first.setdefault(hashes[document], document)
    return split_by_group(list(first.values()), fraction, listing)


def _corpus_hash(train: Sequence[Document], validation: Sequence[Document], hashes: dict[Document, str]) -> str:
    sha = hashlib.sha256()
    for split, documents in (("train", train), ("validation", validation)):
        for document in documents:
            sha.update(json.dumps([split, document.name, hashes[document]]).encode() + b"\n")
    return sha.hexdigest()


def _check_ids(documents: Sequence[Document], vocab_size: int, cache: Path, say: Progress) -> None:
    def find() -> list[int]:
        say(f"Checking {sum(document.size for document in documents) // 2:,} ids.")
        return [max(int(_ids(chunk).max()) for chunk in chunks(document)) for document in documents]

    for document, largest in zip(documents, remembered(cache, "largest id", documents, find), strict=True):
        if largest < vocab_size:
            continue
        position = document.start // 2
        for chunk in chunks(document):
            beyond = np.flatnonzero(_ids(chunk) >= vocab_size)
            if len(beyond):
                raise UserError(
                    f"{document.path}: every id must be below the vocabulary size of {vocab_size:,}; position "
                    f"{position + int(beyond[0]):,} holds {int(_ids(chunk)[beyond[0]]):,}. Set bin_vocab_size to at "
                    f"least {largest + 1:,}, or tokenizer to the one that wrote the ids."
                )
            position += len(chunk) // 2
        raise UserError(f"{document.path} changed while it was read; start again.")


def _ids(chunk: bytes) -> UInt[np.ndarray, " ids"]:
    return np.frombuffer(chunk, "<u2")


def _tokenizer_key(config: DataConfig, given: Tokenizer | None) -> str:
    if given is None:
        return f"bpe{config.bpe_vocab_size}"
    if isinstance(given, ByteTokenizer):
        return "bytes"
    return hashlib.sha256(Path(os.path.expanduser(config.tokenizer)).read_bytes()).hexdigest()


def _encode(
    folder: Path,
    train: Sequence[Document],
    validation: Sequence[Document],
    given: Tokenizer | None,
    bpe_vocab_size: int,
    say: Progress,
) -> None:
    """Write tokenizer.json, train.bin, validation.bin and, last, about.json into `folder`."""
    if given is None:
        say(f"Training a BPE of {bpe_vocab_size:,} ids on {sum(d.size for d in train):,} bytes.")
        tokenizer: Tokenizer = BPETokenizer.train(
            (text for document in train for text in texts(document)), vocab_size=bpe_vocab_size
        )
    else:
        tokenizer = given
    dtype = np.dtype("u1" if tokenizer.vocab_size <= 1 << 8 else "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    tokenizer.save(folder)
    about: dict[str, object] = {"dtype": dtype.str}
    for split, documents in (("train", train), ("validation", validation)):
        say(f"Encoding the {split} split: {sum(d.size for d in documents):,} bytes.")
        about[split] = _encode_split(folder / f"{split}.bin", documents, tokenizer, dtype)
    write_text(folder / "about.json", json.dumps(about))


def _encode_split(path: Path, documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype) -> int:
    """Write the documents' ids, a separator between each two; returns how many ids."""
    with path.open("wb") as file:
        for number, document in enumerate(documents):
            if number:
                file.write(np.array([tokenizer.separator], dtype).tobytes())
            if isinstance(tokenizer, ByteTokenizer):
                for chunk in chunks(document):
                    file.write(chunk)
            else:
                for text in texts(document):
                    file.write(np.array(tokenizer.encode(text), dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())
        return file.tell() // dtype.itemsize


def _map(document: Document, dtype: str) -> UInt[np.ndarray, " tokens"]:
    count = document.size // np.dtype(dtype).itemsize
    return np.memmap(document.path, dtype=dtype, mode="r", offset=document.start, shape=(count,))


def _map_cached(folder: Path, split: str) -> UInt[np.ndarray, " tokens"]:
    about = read_json(folder / "about.json")
    path = folder / f"{split}.bin"
    dtype = np.dtype(about["dtype"])
    if not path.exists() or path.stat().st_size != about[split] * dtype.itemsize:
        raise UserError(f"{path} in the cache is damaged; delete the folder {folder} and start again.")
    return np.memmap(path, dtype=dtype, mode="r", shape=(about[split],))


def _describe(listing: Listing, count: int, sizes: Sequence[int], maps: Sequence[np.ndarray], vocab_size: int) -> str:
    if listing.split_by == "position":
        documents = "1 document"
    else:
        documents = f"{count:,} {'files' if listing.ids else 'documents'}"
    how = {
        "module": "by top-level module",
        "document": "by document",
        "position": f"by position (the last {sizes[1] / sum(sizes):.1%})",
        "file": "by file",
    }[listing.split_by]
    tokens = f"{len(maps[0]):,} training and {len(maps[1]):,} validation tokens of {vocab_size:,} ids"
    return f"{listing.title}: {documents}, {sum(sizes):,} bytes; {tokens}, split {how}"

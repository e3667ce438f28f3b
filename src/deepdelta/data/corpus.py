"""Sources to two arrays of ids, memory-mapped: nothing here grows with the size of the corpus but time and disk."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt

from deepdelta.data.cache import built_once, remembered
from deepdelta.data.config import DataConfig
from deepdelta.data.documents import CHUNK, Document, FileState, Say, chunks, digest, reading, telling, texts
from deepdelta.data.hub import ON_HUB
from deepdelta.data.prepared import check_prepared
from deepdelta.data.sources import Listing, list_source, split_by_group
from deepdelta.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, read_tokenizer
from deepdelta.errors import UserError, nearest
from deepdelta.files import AnyPath


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
        ends_at: the separator at which training windows end; None where they run over the ends of documents.
        sources, mapped: the documents' files and those that `train` and `validation` are mapped from, as they were.
        mixture: training ids and their weights, which add up to 1, where windows are drawn from several sources.
        shards: names and hashes of the files of ids, of a source that has such.
    """

    train: UInt[np.ndarray, " train_tokens"]
    validation: UInt[np.ndarray, " validation_tokens"]
    tokenizer: Tokenizer | None
    vocab_size: int
    sha256: str
    train_bytes: int | None
    validation_bytes: int | None
    description: str
    sources: tuple[FileState, ...]
    mapped: tuple[FileState, ...]
    ends_at: int | None = None
    mixture: tuple[tuple[UInt[np.ndarray, " _"], float], ...] = ()
    shards: tuple[tuple[str, str], ...] = ()

    def check_mapped(self) -> None:
        """Look at size and time of the mapped files again: costs microseconds, and to be called before ids are read.

        Raises:
            UserError: a file has changed. Where it became shorter, reading its ids would end the process.
        """
        for file in self.mapped:
            file.check()

    def check_unchanged(self) -> None:
        """Look at size and time of every file again, those of the documents too; to be called before numbers are kept.

        Raises:
            UserError: a file has changed since the corpus was loaded.
        """
        for file in {*self.sources, *self.mapped}:
            file.check()


def load_source(config: DataConfig, *, cache: AnyPath | None = None, progress: Say | None = None) -> Corpus:
    """The corpus of `config.source` alone.

    A single text file at byte level and `.bin` files are mapped where they lie. Everything else is encoded, document
    by document, into token files in the cache, where the next call finds them. Exact duplicates among the documents
    of a folder or of the standard library are dropped. Splits are fixed:

    - the standard library by top-level module or package, a folder by document: see `sources.split_by_group`;
    - a single text or `.bin` file by position: its end is validation. Text is cut at the start of a character;
    - a data set that has a split validation of its own, train.bin and val.bin as they are.

    Args:
        cache: the folder for token files and for the hashes of large files; `default_cache()` if None, which is asked
            for only where it is needed.
        progress: called with a line of text before each slow step, and every two seconds of it.

    Raises:
        UserError: the source is missing, empty, unreadable, no text, changes meanwhile or cannot be split; text is not
            UTF-8 when BPE is asked; an id is beyond the vocabulary; the tokenizer is unknown; the cache cannot be
            written, or is damaged.
    """
    say, cache = progress or (lambda _: None), None if cache is None else Path(cache)
    listing = list_source(config, cache)
    files = _states(listing.documents)
    sources = (*files, *listing.origins)
    mapped = files
    given = _given_tokenizer(config, listing)
    if config.windows == "documents" and listing.ids and given is None:
        raise UserError(
            "windows='documents' needs the tokenizer that wrote the ids, whose separator ends a document: name its "
            "file by tokenizer, or leave windows at 'joined'."
        )
    hashes = _hashes(listing, cache, say)
    if listing.ids:
        check_prepared(listing.documents, cache)
    train, validation = _split(listing, hashes, config.validation_fraction)
    sha256 = _corpus_hash(train, validation, hashes)
    tokenizer: Tokenizer | None
    if listing.dtype is not None:
        tokenizer = given
        vocab_size = tokenizer.vocab_size if tokenizer else config.bin_vocab_size
        _check_ids(listing.documents, listing.dtype, vocab_size, cache, say)
        if len(train) == len(validation) == 1:
            maps = (_map(train[0], listing.dtype), _map(validation[0], listing.dtype))
        else:
            folder = built_once(cache, f"{sha256}-ids", lambda folder: _join(folder, train, validation, say))
            maps, mapped = _mapped(folder, listing.dtype)
    elif listing.split_by == "position" and isinstance(given, ByteTokenizer):
        tokenizer, vocab_size = given, given.vocab_size
        maps = (_map(train[0], "u1"), _map(validation[0], "u1"))
    else:

        def build(folder: Path) -> None:
            _encode(folder, train, validation, given, config.bpe_vocab_size, say)
            for file in sources:  # what was encoded is what was hashed
                file.check()

        key = given.sha256 if given else f"bpe{config.bpe_vocab_size}"
        folder = built_once(cache, f"{sha256}-{key}", build)
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        vocab_size = tokenizer.vocab_size
        maps, mapped = _mapped(folder, _dtype(vocab_size))
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
        sources=sources,
        mapped=mapped,
        ends_at=tokenizer.separator if tokenizer and config.windows == "documents" else None,
        shards=tuple((one.path.name, hashes[one]) for one in (*train, *validation)) if listing.ids else (),
    )
    corpus.check_unchanged()  # what is mapped is what was hashed
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
    mixed = [("mixed", tokens) for tokens, _ in corpus.mixture]
    for name, tokens in (("training", corpus.train), ("validation", corpus.validation), *mixed):
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
    if config.tokenizer.startswith(ON_HUB):
        return read_tokenizer(config.tokenizer)
    path = Path(os.path.expanduser(config.tokenizer))
    with reading(path):
        there = path.exists()
    if not there:
        raise UserError(
            f"tokenizer must be 'bytes', 'bpe', the path of a `tokenizers` JSON file or of a folder with one, or "
            f"{ON_HUB}OWNER/NAME; there is no file '{config.tokenizer}'; {nearest(config.tokenizer, ('bytes', 'bpe'))}"
        )
    return read_tokenizer(path)


def _hashes(listing: Listing, cache: Path | None, say: Say) -> dict[Document, str]:
    def find() -> list[str]:
        total = sum(document.size for document in listing.documents)
        say(f"Hashing {listing.title}: {total:,} bytes.")
        count = telling(say, "Hashed", total)
        return [digest(document, count) for document in listing.documents]

    return dict(zip(listing.documents, remembered(cache, "sha256", listing.documents, find), strict=True))


def _split(listing: Listing, hashes: dict[Document, str], fraction: float) -> tuple[list[Document], list[Document]]:
    if listing.split_by in ("position", "file", "source"):
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


def _check_ids(documents: Sequence[Document], dtype: str, vocab_size: int, cache: Path | None, say: Say) -> None:
    width = np.dtype(dtype).itemsize

    def find() -> list[int]:
        total = sum(document.size for document in documents)
        say(f"Checking {total // width:,} ids.")
        count = telling(say, "Checked", total)
        return [
            max(int(np.frombuffer(chunk, dtype).max()) for chunk in chunks(document, count)) for document in documents
        ]

    for document, largest in zip(documents, remembered(cache, "largest id", documents, find), strict=True):
        if largest < vocab_size:
            continue
        position = document.start // width
        for chunk in chunks(document):
            ids = np.frombuffer(chunk, dtype)
            beyond = np.flatnonzero(ids >= vocab_size)
            if len(beyond):
                raise UserError(
                    f"{document.path}: every id must be below the vocabulary size of {vocab_size:,}; position "
                    f"{position + int(beyond[0]):,} holds {int(ids[beyond[0]]):,}. Set bin_vocab_size to at "
                    f"least {largest + 1:,}, or tokenizer to the one that wrote the ids."
                )
            position += len(ids)
        raise UserError(f"{document.path} changed while it was read; start again.")


def _states(documents: Sequence[Document]) -> tuple[FileState, ...]:
    """The files of the documents, which go to their ends, as they were listed."""
    sizes: Counter[Path] = Counter()
    for document in documents:
        sizes[document.path] = max(sizes[document.path], document.stop)
    modified = {document.path: document.modified_ns for document in documents}
    return tuple(FileState(path=path, size=size, modified_ns=modified[path]) for path, size in sizes.items())


def _encode(
    folder: Path,
    train: Sequence[Document],
    validation: Sequence[Document],
    given: Tokenizer | None,
    bpe_vocab_size: int,
    say: Say,
) -> None:
    """Write tokenizer.json, train.bin and validation.bin into `folder`."""
    total = sum(d.size for d in train)
    if given is None:
        say(f"Training a BPE of {bpe_vocab_size:,} ids on {total:,} bytes.")
        count = telling(say, "Read for the BPE", total)
        tokenizer: Tokenizer = BPETokenizer.train(
            (text for document in train for text in texts(document, count)),
            vocab_size=bpe_vocab_size,
            show_progress=total >= CHUNK,
        )
    else:
        tokenizer = given
    tokenizer.save(folder)
    for split, documents in (("train", train), ("validation", validation)):
        say(f"Encoding the {split} split: {sum(d.size for d in documents):,} bytes.")
        _encode_split(folder / f"{split}.bin", documents, tokenizer, say)


def _encode_split(path: Path, documents: Sequence[Document], tokenizer: Tokenizer, say: Say) -> None:
    """Write the documents' ids, a separator between each two."""
    count = telling(say, "Encoded", sum(d.size for d in documents))
    dtype = _dtype(tokenizer.vocab_size)
    with path.open("wb") as file:
        for number, document in enumerate(documents):
            if number:
                file.write(np.array([tokenizer.separator], dtype).tobytes())
            if isinstance(tokenizer, ByteTokenizer):
                for chunk in chunks(document, count):
                    file.write(chunk)
            else:
                for text in texts(document, count):
                    file.write(np.array(tokenizer.encode(text), dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _join(folder: Path, train: Sequence[Document], validation: Sequence[Document], say: Say) -> None:
    """Write the ids of shards, one after another, into `folder`."""
    for split, documents in (("train", train), ("validation", validation)):
        say(f"Joining the {split} split: {len(documents):,} shards.")
        count = telling(say, "Joined", sum(d.size for d in documents))
        with (folder / f"{split}.bin").open("wb") as file:
            for document in documents:
                for chunk in chunks(document, count):
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())


def _mapped(folder: Path, dtype: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[FileState, ...]]:
    """The two splits of a folder in the cache, and their files."""
    files = [folder / f"{split}.bin" for split in ("train", "validation")]
    with reading(folder):
        maps = (np.memmap(files[0], dtype, "r"), np.memmap(files[1], dtype, "r"))
    return maps, tuple(FileState.now(file) for file in files)


def _dtype(vocab_size: int) -> str:
    """The narrowest type that holds the ids of a token file in the cache."""
    return "u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4"


def _map(document: Document, dtype: str) -> UInt[np.ndarray, " tokens"]:
    count = document.size // np.dtype(dtype).itemsize
    with reading(document.path):
        return np.memmap(document.path, dtype=dtype, mode="r", offset=document.start, shape=(count,))


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
        "source": "as the data set itself is (validation_fraction without effect)",
    }[listing.split_by]
    tokens = f"{len(maps[0]):,} training and {len(maps[1]):,} validation tokens of {vocab_size:,} ids"
    return f"{listing.title}: {documents}, {sum(sizes):,} bytes; {tokens}, split {how}"

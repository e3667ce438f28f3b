"""Documents on disk, read in chunks."""

import codecs
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from deepdelta.errors import UserError
from deepdelta.files import naming

CHUNK = 1 << 20  # bytes read at once: no document is ever held whole
QUIET = 2.0  # seconds that may pass without a word

Say = Callable[[str], None]
Count = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class FileState:
    """A file as it was when a corpus was made of it."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def now(cls, path: Path) -> "FileState":
        with reading(path):
            found = path.stat()
        return cls(path=path, size=found.st_size, modified_ns=found.st_mtime_ns)

    def check(self) -> None:
        """Raise a UserError if the file's size or time of last change is another now."""
        if (now := self.now(self.path)) != self:
            sizes = f"{self.size:,} bytes then, {now.size:,} now" if now.size != self.size else "another time now"
            raise UserError(
                f"{self.path} must stay as it was when it was loaded, but was changed since ({sizes}): what is "
                "computed of it would belong to no one text. Put the old file back, or start anew with the new one."
            )


@dataclass(frozen=True, kw_only=True)
class Document:
    """The bytes [start, stop) of a file.

    Attributes:
        name: what the document is called in the corpus, wherever the corpus lies.
        group: documents of one group are never split between training and validation.
        modified_ns: when the file was last changed, in nanoseconds since the epoch.
    """

    name: str
    group: str
    path: Path
    start: int
    stop: int
    modified_ns: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def reading(path: Path) -> AbstractContextManager[None]:
    """Errors of the file system while `path` is read, as the user's."""
    return naming(path, "read", "Mend or remove it, or give another source.")


def telling(say: Say, what: str, total: int) -> Count:
    """A function that takes how many more bytes are done, and says how many of `total` are, every two seconds."""
    last, done = time.monotonic(), 0

    def count(more: int) -> None:
        nonlocal last, done
        done += more
        if (now := time.monotonic()) - last >= QUIET:
            last = now
            say(f"{what}: {done:,} of {total:,} bytes.")

    return count


def head(document: Document, size: int) -> bytes:
    """The first `size` bytes of the document, all of them if it is shorter."""
    with reading(document.path), document.path.open("rb") as file:
        file.seek(document.start)
        return file.read(min(size, document.size))


def chunks(document: Document, count: Count = lambda _: None) -> Iterator[bytes]:
    """The document's bytes, at most `CHUNK` at a time; `count` takes how many were read."""
    with reading(document.path), document.path.open("rb") as file:
        file.seek(document.start)
        left = document.size
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise UserError(f"{document.path} became shorter while it was read; start again.")
            left -= len(chunk)
            count(len(chunk))
            yield chunk


def digest(document: Document, count: Count = lambda _: None) -> str:
    """The SHA-256 of the document's bytes."""
    sha = hashlib.sha256()
    for chunk in chunks(document, count):
        sha.update(chunk)
    return sha.hexdigest()


def texts(document: Document, count: Count = lambda _: None) -> Iterator[str]:
    """The document's text in pieces of about `CHUNK` bytes, cut after a line break where there is one.

    Raises:
        UserError: the document is not UTF-8, with the file and the offset of the first bad byte in it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = document.start
    rest = ""
    for chunk in chain(chunks(document, count), [b""]):
        held = len(decoder.getstate()[0])
        try:
            text = rest + decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{document.path} must be UTF-8 to be split into BPE tokens; byte {position - held + error.start:,} "
                "is not. Convert the file, leave it out by the pattern, or use the tokenizer 'bytes'."
            ) from None
        position += len(chunk)
        cut = (text.rfind("\n") + 1 or len(text)) if chunk else len(text)
        rest = text[cut:]
        if cut:
            yield text[:cut]

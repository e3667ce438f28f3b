"""Documents on disk, read in chunks."""

import codecs
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from deepdelta.errors import UserError

CHUNK = 1 << 20  # bytes read at once: no document is ever held whole


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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the file system while `path` is read, as the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Mend or remove it, or give another source."
        ) from error


def chunks(document: Document) -> Iterator[bytes]:
    """The document's bytes, at most `CHUNK` at a time."""
    with reading(document.path), document.path.open("rb") as file:
        file.seek(document.start)
        left = document.size
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise UserError(f"{document.path} became shorter while it was read; start again.")
            left -= len(chunk)
            yield chunk


def digest(document: Document) -> str:
    """The SHA-256 of the document's bytes."""
    sha = hashlib.sha256()
    for chunk in chunks(document):
        sha.update(chunk)
    return sha.hexdigest()


def texts(document: Document) -> Iterator[str]:
    """The document's text in pieces of about `CHUNK` bytes, cut after a line break where there is one.

    Raises:
        UserError: the document is not UTF-8, with the file and the offset of the first bad byte in it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = document.start
    rest = ""
    for chunk in chain(chunks(document), [b""]):
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

"""Text in other files than text: compressed, one JSON record a line, a column of a Parquet table or of a data set.

What such a file holds is written once to the cache, as its documents one after another and where each of them ends;
from there on it is text like any other.
"""

import gzip
import hashlib
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from deepdelta.data.cache import built_once
from deepdelta.data.documents import CHUNK, Document, FileState, digest, reading
from deepdelta.data.sets import TextSet
from deepdelta.errors import UserError, without_extra
from deepdelta.files import sha256_of
from deepdelta.releases import check_tested

COMPRESSED = (".gz", ".zst")
RECORDS = (".jsonl", ".ndjson")
TABLE = ".parquet"
_TEXT, _ENDS = "text", "ends"


def is_packed(path: Path) -> bool:
    """By the end of its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[-1:] != [] and (suffixes[-1] in (*COMPRESSED, *RECORDS, TABLE))


def holds_records(path: Path) -> bool:
    """Whether the documents of a packed file are its records or rows, not the file as a whole."""
    return _inner(path) in (*RECORDS, TABLE)


def unpacked(path: Path, name: str, field: str, cache: Path | None) -> list[Document]:
    """The documents of a packed file, as they lie in the cache; empty ones are left out.

    Args:
        name: of the file in the corpus.
        field: of JSON records or of a table, the one that holds the text.

    Raises:
        UserError: the file is damaged or no such file, or a record lacks the field, each named; the extra `data` is
            needed and absent; the cache cannot be written.
    """
    found = FileState.now(path)
    whole = Document(name=name, group=name, path=path, start=0, stop=found.size, modified_ns=found.modified_ns)
    if holds_records(path):
        key = f"{digest(whole)}-{field}-text"
        documents = written_once(key, name, lambda: records_of(path, field), cache)
    else:
        documents = written_once(f"{digest(whole)}-whole-text", name, lambda: bytes_of(path), cache, records=False)
    found.check()
    return documents


def unpacked_set(texts: TextSet, field: str, cache: Path | None) -> tuple[list[Document], tuple[FileState, ...]]:
    """The rows of a data set as documents in the cache, and the files that they come from. What the hub has under a
    name is fetched once.

    Raises:
        UserError: as of `TextSet.texts`; a row whose field is no text; the cache cannot be written.
    """
    files = tuple(map(FileState.now, texts.files()))
    sha = hashlib.sha256(json.dumps([str(texts.place) if not files else texts.name, field]).encode())
    for one in files:
        sha.update(sha256_of(one.path).encode())
    found = ((f"row {number:,}", text) for number, text in texts.texts(field))
    key = f"{sha.hexdigest()}-set-text"
    documents = written_once(key, texts.name, lambda: checked(found, str(texts.place), field), cache)
    for one in files:
        one.check()
    return documents, files


def written_once(
    key: str, name: str, pieces: Callable[[], Iterator[bytes]], cache: Path | None, *, records: bool = True
) -> list[Document]:
    """The documents of what `pieces()` gives, as they lie in the cache; empty ones are left out.

    Args:
        key: of what is written, in the cache.
        name: of the source in the corpus; its records are `name:0`, `name:1` and so on.
        records: whether each piece is a document, or all of them are one.
    """

    def build(folder: Path) -> None:
        ends, end = [], 0
        with (folder / _TEXT).open("wb") as file:
            for piece in pieces():
                file.write(piece)
                end += len(piece)
                if records and piece:
                    ends.append(end)
        np.asarray(ends if records else [end], np.int64).tofile(folder / _ENDS)

    folder = built_once(cache, key, build)
    modified = FileState.now(folder / _TEXT).modified_ns
    with reading(folder):
        ends = np.fromfile(folder / _ENDS, np.int64).tolist()
    documents = []
    for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        own = f"{name}:{number}" if records else name
        documents.append(
            Document(name=own, group=own, path=folder / _TEXT, start=start, stop=stop, modified_ns=modified)
        )
    return [document for document in documents if document.size]


def records_of(path: Path, field: str) -> Iterator[bytes]:
    """The text of every record or row, as UTF-8."""
    return checked(_rows(path, field) if _inner(path) == TABLE else _lines(path, field), str(path), field)


def checked(texts: Iterator[tuple[str, Any]], source: str, field: str) -> Iterator[bytes]:
    """Texts beside where they stand, as UTF-8; none is left out.

    Raises:
        UserError: one that is no text.
    """
    for where, text in texts:
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"{source}, {where}: '{field}' must be text, got {type(text).__name__}; name another by field."
            )
        yield text.encode("utf-8", errors="surrogatepass")


def _lines(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"line {number:,}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, {where}, must be one JSON record: {error}.") from None
            if not isinstance(record, dict) or field not in record:
                held = (
                    f"the fields {', '.join(map(repr, record))}" if isinstance(record, dict) else type(record).__name__
                )
                raise UserError(
                    f"{path}, {where}: there is no '{field}', but {held}; name the one with the text by field."
                )
            yield where, record[field]


def _rows(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    arrow, parquet = _arrow("Parquet files", "pyarrow"), _arrow("Parquet files", "pyarrow.parquet")
    with reading(path):
        try:
            table = parquet.ParquetFile(path)
            if field not in table.schema_arrow.names:
                held = ", ".join(map(repr, table.schema_arrow.names))
                raise UserError(f"{path} has no column '{field}', but {held}; name the one with the text by field.")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield f"row {number:,}", value
                    number += 1
        except arrow.ArrowInvalid as error:
            raise UserError(f"{path} must be a Parquet file; it says: {error}.") from None


def bytes_of(path: Path) -> Iterator[bytes]:
    """What a file holds, decompressed, in pieces."""
    with _opened(path) as file:
        while piece := file.read(CHUNK):
            yield piece


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, of a compressed one those that were compressed."""
    suffix = path.suffix.lower()
    with reading(path):
        try:
            if suffix == ".gz":
                with gzip.open(path, "rb") as file:
                    yield file
            elif suffix == ".zst":
                arrow = _arrow("Files compressed by zstd", "pyarrow")
                with arrow.CompressedInputStream(arrow.OSFile(str(path), "rb"), "zstd") as stream:
                    yield io.BufferedReader(stream)  # what pyarrow gives has no lines
            else:
                with path.open("rb") as file:
                    yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} must be a file that gzip compressed: {error}; give a whole one.") from None
        except OSError as error:
            if error.errno is None and suffix == ".zst":
                raise UserError(f"{path} must be a file that zstd compressed: {error}; give a whole one.") from None
            raise


def _inner(path: Path) -> str:
    """The suffix below that of a compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _arrow(what: str, module: str) -> Any:
    check_tested("pyarrow")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise without_extra(what, "data", error) from None

"""The user's cache: facts about large files that need not be found again, and folders of encoded tokens."""

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepdelta.data.documents import Document
from deepdelta.errors import UserError
from deepdelta.files import read_plain, write_text

REMEMBER_FROM = 1 << 26  # bytes: less than this is read again in a fraction of a second
_SETTLED_NS = 2_000_000_000  # a file changed within the coarsest clock tick of a file system may change unseen


def default_cache() -> Path:
    """`$DEEPDELTA_CACHE`, or the folder for caches of this user on this platform, `deepdelta` in it."""
    if chosen := os.environ.get("DEEPDELTA_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "deepdelta"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "deepdelta"


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Errors of the file system while the cache is written, as the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {cache} must be writable; it says: {error.strerror}. "
            "Set the environment variable DEEPDELTA_CACHE to another folder."
        ) from error


def read_json(path: Path) -> Any:
    """The data in a file of the cache."""
    return read_plain(path, "it is in the cache: delete it and start again")


def remembered(cache: Path, fact: str, documents: Sequence[Document], find: Callable[[], list[Any]]) -> list[Any]:
    """What `find()` returns, one value per document; where the documents are large, found once and kept in the cache.

    A fact holds as long as every file has its absolute path, its size and its time of last change.
    """
    if sum(document.size for document in documents) < REMEMBER_FROM:
        return find()
    began = time.time_ns()
    known_by = [[str(d.path.resolve()), d.start, d.stop, d.modified_ns] for d in documents]
    key = hashlib.sha256(json.dumps([fact, known_by]).encode()).hexdigest()
    path = cache / "facts" / f"{key}.json"
    if path.exists():
        values: list[Any] = read_json(path)
        return values
    values = find()
    if began - max(document.modified_ns for document in documents) > _SETTLED_NS:
        with writing(cache):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(values))
    return values


def built_once(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `build(folder)` unless it is there.

    It appears under its name only when complete. Of two processes that build it at once, the first to finish
    provides it and the other drops its own.
    """
    final = cache / "tokens" / name
    if final.is_dir():
        return final
    with writing(cache):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{name}-{secrets.token_hex(8)}")
        try:
            temporary.mkdir()
            build(temporary)
            try:
                temporary.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final

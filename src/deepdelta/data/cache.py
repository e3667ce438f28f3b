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

from deepdelta.data.documents import Document, reading
from deepdelta.errors import UserError
from deepdelta.files import read_object, sha256_of, write_text

REMEMBER_FROM = 1 << 26  # bytes: less than this is read again in a fraction of a second
_FORMAT = 2  # part of the names in the cache: raise it when what is written changes
_SUMS = "sha256.json"
_MEND = "delete it and start again"
_SETTLED_NS = 2_000_000_000  # a file changed within the coarsest clock tick of a file system may change unseen


def default_cache() -> Path:
    """`$DEEPDELTA_CACHE`, or the folder for caches of this user on this platform, `deepdelta` in it.

    Raises:
        UserError: the user has no home folder, and no variable names another place.
    """
    if chosen := os.environ.get("DEEPDELTA_CACHE"):
        return Path(os.path.expanduser(chosen))
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if sys.platform != "darwin" and os.path.isabs(shared):
        return Path(shared) / "deepdelta"
    try:
        home = Path.home()
    except RuntimeError:
        raise UserError(
            "a cache folder is needed, and this user has no home folder to hold it: set the environment variable "
            "DEEPDELTA_CACHE to a folder that can be written."
        ) from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "deepdelta"


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


def remembered(
    cache: Path | None, fact: str, documents: Sequence[Document], find: Callable[[], list[Any]]
) -> list[Any]:
    """What `find()` returns, one value per document; where the documents are large, found once and kept in the cache.

    A fact holds as long as every file has its absolute path, its size and its time of last change.
    """
    if sum(document.size for document in documents) < REMEMBER_FROM:
        return find()
    cache = cache or default_cache()
    began = time.time_ns()
    known_by = [[str(d.path.resolve()), d.start, d.stop, d.modified_ns] for d in documents]
    path = cache / "facts" / f"{_sha256([_FORMAT, fact, known_by])}.json"
    with reading(path):
        there = path.exists()
    if there:
        kept = read_object(path, _MEND)
        values: list[Any] = kept.get("values", [])
        if _sha256(values) != kept.get("sha256"):
            raise UserError(f"{path} in the cache is damaged; {_MEND}.")
        return values
    values = find()
    if began - max(document.modified_ns for document in documents) > _SETTLED_NS:
        with writing(cache):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"values": values, "sha256": _sha256(values)}))
    return values


def built_once(cache: Path | None, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `build(folder)` unless it is there.

    It appears under its name only when complete. Of two processes that build it at once, the first to finish
    provides it and the other drops its own. Every file in it is compared with the checksum that was written with it.

    Raises:
        UserError: a file is damaged; the cache cannot be read or written.
    """
    cache = cache or default_cache()
    final = cache / "tokens" / f"{name}-{_FORMAT}"
    with writing(cache):
        if not final.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = final.with_name(f".{name}-{secrets.token_hex(8)}")
            try:
                temporary.mkdir()
                build(temporary)
                write_text(temporary / _SUMS, json.dumps(_sums(temporary)))
                try:
                    temporary.rename(final)
                except OSError:
                    if not final.is_dir():
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    mend = f"delete the folder {final} and start again"
    with reading(final):
        written, found = read_object(final / _SUMS, mend), _sums(final)
    for file in sorted({*written, *found}):
        if written.get(file) != found.get(file):
            raise UserError(f"{final / file} in the cache is damaged; {mend}.")
    return final


def _sums(folder: Path) -> dict[str, str]:
    """The checksums of the files in the folder but of their own, and of what a file browser may have left there."""
    return {name: sha256_of(folder / name) for name in os.listdir(folder) if name != _SUMS and name[0] != "."}


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()

"""Files are written whole or not at all: a temporary beside the target, flushed to disk, then renamed over it.

They are read by one reader of JSON and TOML, and what the file system refuses is the user's to mend.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from deepdelta.errors import UserError

PARTIAL, LOCK = ".deepdelta-partial", "lock"
"""How a folder that a file is being written in ends, and the file in it that its writer holds locked."""
_HALVES = re.compile("[\ud800-\udfff]")
DEPTH = 100
"""Objects and lists within each other that a file may have: beyond it, whoever walks through them fails."""
SMALLEST, LARGEST = -(1 << 63), (1 << 64) - 1
"""Integers that a file may have: those of 64 bits."""
HELD = ".results.lock"
"""The file in a folder for results that holds the number of the process at work there."""

FORMAT = 1
"""Of run directories, records of runs, saved retrofits and study files."""

AnyPath = str | os.PathLike[str]
"""What may be given for a path; a Path inside."""


@contextmanager
def naming(path: Path, deed: str, mend: str = "") -> Iterator[None]:
    """Errors of the file system and of the safetensors library as the user's: `path` cannot be `deed`, and why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be {deed}: {getattr(error, 'strerror', None) or error}. {mend}".strip()
        ) from error


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target` when the block ends without an error.

    It lies in a folder of its own beside the target, so that what a library writes beside it in turn is there too. What
    killed writers left beside the target is removed first. The file has the mode that the umask gives.

    Raises:
        UserError: it cannot be written; what was at `target` is then as it was.
    """
    with naming(target, "written", "What was there before is unchanged."):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent)
        with _workplace(target.parent) as folder:
            temporary = folder / target.name
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # the safetensors library replaces the file by one that its owner alone can read
            _sync(temporary)
            os.replace(temporary, target)
        try:
            _sync(target.parent)
        except OSError as error:
            # Some file systems, and folders that may not be listed, cannot be synced: the file itself is on disk.
            if error.errno not in (errno.EINVAL, errno.EACCES):
                raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _workplace(beside: Path) -> Iterator[Path]:
    """A new folder in `beside`, gone when the block ends. Its lock is held as long as its writer lives."""
    while True:
        folder = beside / f".{secrets.token_hex(8)}{PARTIAL}"
        folder.mkdir()
        try:
            try:
                lock = (folder / LOCK).open("w")
            except FileNotFoundError:  # taken for one that was left, as it had no lock yet
                continue
            with lock:
                with suppress(OSError):  # a file system without locks, on which nobody removes what others left
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not (folder / LOCK).exists():  # likewise, as its lock was not held yet
                    continue
                yield folder
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Delete what killed writers left in `folder`, and nothing that a living one writes."""
    for left in folder.glob(f".{'[0-9a-f]' * 16}{PARTIAL}"):
        # An error: its lock is held, or the file system has none, or it is no folder of ours.
        with suppress(OSError):
            try:
                lock = (left / LOCK).open("r+")
            except FileNotFoundError:
                left.rmdir()  # empty, since the lock comes first
                continue
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)


def write_text(target: Path, text: str) -> None:
    """Who reads `target` meanwhile finds the old file or the whole new one."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, data: Any) -> None:
    write_text(target, json.dumps(data, indent=1, allow_nan=False) + "\n")


def parse(content: str | bytes, what: str, mend: str, *, toml: bool = False) -> Any:
    """The data in a text of JSON or TOML; the one place where either is read.

    Args:
        content: bytes are UTF-8, a byte order mark before them is passed over.
        what: how messages name the text, such as its file.
        mend: what to do if it cannot be read, for the message.

    Raises:
        UserError: damaged text; more than `DEPTH` levels; an integer of more than 64 bits; half of a surrogate pair.
    """
    kind = "a TOML table" if toml else "a JSON object"
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        data = tomllib.loads(text) if toml else json.loads(text)
    except RecursionError:
        raise UserError(f"{what} must hold {kind} of at most {DEPTH} levels, but is deeper; {mend}.") from None
    except ValueError as error:
        raise UserError(f"{what} must hold {kind}, but is damaged ({error}); {mend}.") from None
    level = [data]
    for _ in range(DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and _HALVES.search(value):
                raise UserError(f"{what} must hold text of Unicode, but has half of a surrogate pair; {mend}.")
            elif isinstance(value, int) and not SMALLEST <= value <= LARGEST:
                raise UserError(f"{what} must hold integers of at most 64 bits, but has a larger one; {mend}.")
        if not (level := inner):
            return data
    raise UserError(f"{what} must hold {kind} of at most {DEPTH} levels, but is deeper; {mend}.")


def read_plain(source: Path, mend: str) -> Any:
    """The data in a file: TOML where its name ends in .toml, else JSON. A byte order mark is passed over.

    Raises:
        UserError: the file cannot be read; see also `parse`.
    """
    with naming(source, "read", f"{mend[:1].upper()}{mend[1:]}."):
        content = source.read_bytes()
    return parse(content, str(source), mend, toml=source.suffix == ".toml")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(source: Path, mend: str) -> dict[str, Any]:
    """The object in a file of JSON, or the table in one of TOML.

    Args:
        mend: what to do if the file does not hold one, for the message.

    Raises:
        UserError: it holds something else; see also `read_plain`.
    """
    data = read_plain(source, mend)
    if not isinstance(data, dict):
        raise UserError(f"{source} must hold a JSON object, got {type(data).__name__}; {mend}.")
    return data


def check_format(plain: Mapping[str, Any], where: object, *, reads: int = FORMAT, missing: int = 0) -> None:
    """Refuse what was written in another format than this version reads; without a number, `missing` is meant.

    Raises:
        UserError: naming the version that reads it, which is the one that wrote it.
    """
    if (there := plain.get("format", missing)) == reads:
        return
    wrote, commit = plain.get("versions"), plain.get("commit")
    version = wrote.get("deepdelta") if isinstance(wrote, Mapping) else None
    reader = f"read it with deepdelta {version}" if version else "it does not say which version wrote it"
    at = f" at commit {commit}" if version and commit else ""
    raise UserError(f"{where} has format {there}, and this version reads {reads}: {reader}{at}.")


def check_readable(file: Path, mend: str) -> None:
    """Refuse a file that cannot be opened, with the reason: of each such file, the safetensors library says that there
    is none.

    Raises:
        UserError: the file cannot be opened.
    """
    with naming(file, "read", mend), file.open("rb"):
        pass


def check_folder(out: Path, option: str = "--out") -> None:
    """Refuse what can be no folder for results, before the work that leads to them, by a try that leaves nothing.

    Args:
        option: the option or argument that gives another folder, for the message.

    Raises:
        UserError: there can be none, or nothing can be written there.
    """
    missing = [path for path in (out, *out.absolute().parents) if not os.path.lexists(path)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out, buffering=0) as trial:
            trial.write(b"\0")
    except OSError as error:
        raise UserError(f"{out} cannot be a folder for results: {error.strerror}. Give another {option}.") from None
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a path that leads out of a folder for results, by links say, before anything is written or deleted there.

    Raises:
        UserError: it does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{path} must lie in {folder}, but leads to {path.resolve()}: remove the link, or give another --out."
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a folder for results, made if absent, so that no second command works in it; nothing of it stays behind.

    Raises:
        UserError: another process holds it, or `check_folder` refuses it.
    """
    check_folder(out)
    made, path = [folder for folder in (out, *out.absolute().parents) if not os.path.lexists(folder)], out / HELD
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _held(path):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # there are results in it
            for folder in made:
                folder.rmdir()


def _held(path: Path) -> TextIO:
    """The file, locked and holding the number of this process; the lock ends with the process, however that ends."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().strip()
            by = f"process {holder}" if holder else "another process"
            raise UserError(f"{path.parent} is in use by {by}: wait for it, stop it, or give another --out.") from None
        with suppress(FileNotFoundError):
            # Whoever held it before may have deleted it after we opened it; then it locks nothing any more.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                print(os.getpid(), file=file, flush=True)
                return file
        file.close()

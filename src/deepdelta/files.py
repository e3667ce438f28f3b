"""Files are written whole or not at all: a temporary beside the target, flushed to disk, then renamed over it."""

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepdelta.errors import UserError

PARTIAL, LOCK = ".deepdelta-partial", "lock"
"""How a folder that a file is being written in ends, and the file in it that its writer holds locked."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target` when the block ends without an error.

    It lies in a folder of its own beside the target, so that what a library writes beside it in turn is there too. What
    killed writers left beside the target is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    with _workplace(target.parent) as folder:
        temporary = folder / target.name
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)


@contextmanager
def _workplace(beside: Path) -> Iterator[Path]:
    """A new folder in `beside`, gone when the block ends. Its lock is held as long as its writer lives."""
    folder = beside / f".{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        with (folder / LOCK).open("w") as lock:
            with suppress(OSError):  # a file system without locks, on which nobody removes what others left
                fcntl.flock(lock, fcntl.LOCK_EX)
            # It takes the name that others look for only now that it is locked.
            folder = folder.rename(folder.with_name(folder.name + PARTIAL))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed writers left in `folder`, and nothing that a living one writes."""
    for left in folder.glob(f".{'[0-9a-f]' * 16}{PARTIAL}"):
        # An error: its lock is held, or gone with its writer, or the file system has none.
        with suppress(OSError), (left / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)


def write_text(target: Path, text: str) -> None:
    """Who reads `target` meanwhile finds the old file or the whole new one."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, data: Any) -> None:
    write_text(target, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_object(source: Path, mend: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        mend: what to do if the file does not hold one, for the message.

    Raises:
        UserError: it holds something else, or cannot be read.
    """
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{source} must hold a JSON object, but cannot be read ({error.strerror}); {mend}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{source} must hold a JSON object, but is damaged ({error}); {mend}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{source} must hold a JSON object, got {type(data).__name__}; {mend}.")
    return data


def check_folder(out: Path) -> None:
    """Refuse what can be no folder for results, before the work that leads to them; nothing is made yet.

    Raises:
        UserError: there can be none, or nothing can be written there.
    """
    there = next(path for path in (out, *out.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        reason = os.strerror(errno.EEXIST if there == out else errno.ENOTDIR)
        raise UserError(f"{out} cannot be a folder for results: {reason}. Give another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be written. Give another --out.")

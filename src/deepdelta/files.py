"""Files are written whole or not at all: a temporary beside the target, flushed to disk, then renamed over it."""

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepdelta.errors import UserError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path in the target's folder that becomes `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed writers left in `folder`; for a caller who knows that nobody writes there now."""
    for left in folder.glob(f".*-{'[0-9a-f]' * 16}"):
        left.unlink(missing_ok=True)


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

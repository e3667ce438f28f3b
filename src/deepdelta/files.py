"""Files are written whole or not at all: a temporary beside the target, flushed to disk, then renamed over it."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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

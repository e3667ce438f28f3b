"""Files of results: what each says of itself, and the one reader of all kinds."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deepdelta.config import from_plain, to_plain
from deepdelta.errors import UserError
from deepdelta.files import AnyPath, check_format, read_object, write_json
from deepdelta.provenance import Provenance

FORMAT = 2
"""Of results.json, scaling.json, search.json and audit.json; 1 had no analysis in it."""


@dataclass(frozen=True, kw_only=True)
class Stored(Provenance):
    """What every file of results holds: the provenance of its numbers and the format it is written in."""

    format: int = FORMAT

    def save(self, path: AnyPath) -> None:
        """Write the file atomically."""
        write_json(Path(path), to_plain(self))


S = TypeVar("S", bound=Stored)


def load_stored(cls: type[S], path: AnyPath, command: str) -> S:
    """The results in a file that `command` wrote.

    Raises:
        UserError: no such file, one of another format, or one that does not hold such results.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} must hold results that {command} wrote, but there is no such file.")
    plain = read_object(path, f"run {command} again")
    check_format(plain, path, reads=FORMAT, missing=1)
    return from_plain(cls, plain, where=str(path))

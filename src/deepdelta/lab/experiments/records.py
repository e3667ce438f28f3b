"""The finished runs of a folder in one compressed file, a line of JSON each; what is in it is never run again.

The file is a sequence of xz streams. A record is appended as a stream of its own the moment its run ends, so that a
killed process loses at most the record in progress; `compact` makes one stream of all, a fifth of the size.
"""

import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepdelta.errors import UserError
from deepdelta.files import FORMAT, atomic_path, check_format, naming, parse

FILE_NAME = "runs.jsonl.xz"
MAGIC = b"\xfd7zXZ\x00"
MEND = "restore it, or give another --out"


class RecordFile:
    """The records in `FILE_NAME` of a folder, by name, read once. One process writes it: the folder is held.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something else than records of this format.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._rows: dict[str, dict[str, Any]] | None = None
        self._length = 0
        """Bytes of whole streams; what follows them was cut short."""

    def __contains__(self, name: str) -> bool:
        return name in self.rows()

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every record as plain data, in the order in which runs ended."""
        if self._rows is None:
            self._rows = {}
            if self.path.exists():
                with naming(self.path, "read"):
                    data = self.path.read_bytes()
                for number, line in enumerate(self._lines(data), 1):
                    where = f"{self.path}, line {number}"
                    row = parse(line, where, MEND)
                    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
                        raise UserError(f"{where} must be a record with a name; {MEND}.")
                    check_format(row, where)
                    del row["format"]
                    self._rows[row["name"]] = row
        return self._rows

    @property
    def experiment(self) -> str | None:
        """The study or the task that the records are of, if there are any."""
        return next((row.get("experiment") for row in self.rows().values()), None)

    def append(self, row: dict[str, Any]) -> None:
        """Add a record and have it on the disk."""
        rows = self.rows()
        data = lzma.compress(_line(row), check=lzma.CHECK_SHA256)
        with naming(self.path, "written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._length)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self._length += len(data)
        rows[row["name"]] = row

    def compact(self) -> None:
        """Write the file anew as one stream, whole or not at all."""
        data = lzma.compress(b"".join(map(_line, self.rows().values())), check=lzma.CHECK_SHA256, preset=9)
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(data)
        self._length = len(data)

    def _lines(self, data: bytes) -> list[bytes]:
        lines: list[bytes] = []
        while rest := data[self._length :]:
            stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            try:
                text = stream.decompress(rest)
                if not MAGIC.startswith(rest[: len(MAGIC)]):  # too little of it for the decompressor to judge
                    raise lzma.LZMAError("Not a stream of xz")
            except lzma.LZMAError as error:
                raise UserError(f"{self.path} is damaged ({error}); {MEND}.") from None
            if not stream.eof:
                break
            self._length = len(data) - len(stream.unused_data)
            lines += text.splitlines()
        return lines


SAME = ("experiment", "condition", "seed", "settings", "inputs", "metrics", "diverged")
"""Of two records of a name: what must be equal."""


def take_over(out: Path, folders: Sequence[Path]) -> None:
    """Add the records in folders of the same experiment, on other machines say, to those in `out`; nothing is written
    before all of them have been read.

    Raises:
        UserError: a folder holds none, or another experiment; or two records of a name that differ in more than where
            and when they were made.
    """
    own, new = RecordFile(out), dict[str, tuple[Path, dict[str, Any]]]()
    for folder in folders:
        other = RecordFile(folder)
        if not other.rows():
            raise UserError(f"{folder} must hold the records of a study, {FILE_NAME}, but holds none.")
        for name, row in other.rows().items():
            place, there = new.get(name, (out, own.rows().get(name)))
            if there is None:
                new[name] = folder, row
            elif different := [key for key in SAME if there.get(key) != row.get(key)]:
                raise UserError(
                    f"the records of {name} in {place} and {folder} contradict each other ({', '.join(different)}): "
                    "leave one of the folders out, or delete what is wrong."
                )
    if own.experiment is None and len(names := {row["experiment"] for _, row in new.values()}) > 1:
        raise UserError(f"the folders hold different studies, {' and '.join(sorted(names))}: leave some out.")
    for name, (folder, row) in new.items():
        if own.experiment not in (None, row["experiment"]):
            raise UserError(f"{folder} holds {name} of {row['experiment']}, and {out} the study {own.experiment}.")
    for _, row in new.values():
        own.append(row)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT} | row, allow_nan=False, separators=(",", ":")).encode() + b"\n"

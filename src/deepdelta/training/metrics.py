"""metrics.jsonl: a line per step, and one per validation, each handed to the system at once and checked when read."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepdelta.errors import UserError
from deepdelta.files import naming, parse

ROWS: tuple[frozenset[str], ...] = (
    frozenset({"step", "loss", "lr", "gradient_norm", "seconds"}),
    frozenset({"step", "skipped", "lr", "seconds"}),
    frozenset({"step", "validation_loss", "validation_tokens", "final", "seconds"}),
    frozenset({"step", "diverged"}),
)
"""What a line holds at least, all of it numbers: of a step, of one whose loss or gradient was not finite (with how many
the run has had), of a validation after it, of a step that cannot be made."""


def is_step(row: Mapping[str, Any]) -> bool:
    """Whether the line is of a step that was made, or skipped."""
    return "loss" in row or "skipped" in row


def append_json(file: Path, row: Mapping[str, Any]) -> None:
    """Append one line, handed to the system at once, so that a killed process loses at most the line in progress."""
    with naming(file, "written"), file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, allow_nan=False) + "\n")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The lines in order; a last one that a crash cut short is left out. None where there is no file.

    Raises:
        UserError: a line is damaged, or the lines are not those of steps 1 to n.
    """
    if not file.exists():
        return
    made = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            row = _row(line, file, f"line {number}")
            expected = made + (is_step(row) or "diverged" in row)
            if row["step"] != expected:
                how = f"must hold every step from 1 on, but line {number} is of step {row['step']}, not {expected}"
                raise damaged(file, how)
            made += is_step(row)
            yield row


def last_row(file: Path) -> dict[str, Any]:
    """The last line, empty without one; reads the end of the file alone.

    Raises:
        UserError: that line is damaged.
    """
    if not file.exists():
        return {}
    with file.open("rb") as end:
        end.seek(max(0, end.seek(0, os.SEEK_END) - 4096))
        lines = end.read().split(b"\n")[:-1]
    return _row(lines[-1], file, "its last line") if lines else {}


def damaged(file: Path, how: str) -> UserError:
    return UserError(f"{file} {how}; {_mend(file)}.")


def _mend(file: Path) -> str:
    return f"restore it, or delete {file.parent} and train anew"


def _row(line: bytes, file: Path, where: str) -> dict[str, Any]:
    text = line.decode("utf-8", errors="replace")
    row = parse(text, f"{where} of {file}", _mend(file))
    if (
        not isinstance(row, dict)
        or not any(kind <= row.keys() for kind in ROWS)
        or not all(isinstance(value, int | float) and math.isfinite(value) for value in row.values())
        or not isinstance(row["step"], int)
    ):
        raise damaged(file, f"must hold the numbers of a step per line, but {where} is {text.strip():.80}")
    return row

"""What several commands share."""

import shlex
from pathlib import Path

import torch

from deepdelta.limits import check_threads
from deepdelta.progress import show
from deepdelta.training import RunDirectory


def use_threads(threads: int | None, run: Path | None = None) -> None:
    """Compute with so many CPU threads; None: as many as the run was trained with, or torch's choice.

    Raises:
        UserError: no such number.
    """
    if threads is None and run is not None:
        threads = RunDirectory(run).config().threads
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def following(*commands: tuple[str | Path, ...]) -> None:
    """Say which commands go on from here, one line."""
    show("Next: " + ", or ".join(shlex.join(map(str, command)) for command in commands))


def to_read(*files: Path) -> None:
    """Say which file is to be read now: the first of these that was written."""
    show(f"Next: read {next(file for file in files if file.exists())}")

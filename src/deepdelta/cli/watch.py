"""The command that looks on: watch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Look on while a run or a study is at work, until it ends: losses, tokens/s, ETA, mean gate. In a pipe a line for
    each change. Nothing is written, and Ctrl-C leaves the run alone."""

    path: Positional[Annotated[Path, arg(metavar="RUN|STUDY")]]
    """The folder of a run, a study or a task."""

    def __call__(self) -> None:
        # Here, since the other commands need nothing of the laboratory.
        from deepdelta.lab.watching import watch

        watch(self.path)

"""A run of an experiment of whatever kind: a process, what that leaves behind, and the record made of it."""

from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from deepdelta.config import from_plain, to_plain
from deepdelta.errors import UserError
from deepdelta.files import check_inside
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import RecordFile


@dataclass(frozen=True, kw_only=True, eq=False)
class Run(ABC):
    """One run that an experiment needs: a process, what that leaves behind, and the record made of it."""

    name: str
    """Of its record."""
    experiment: str
    """The study or the task that it belongs to."""
    condition: str
    seed: int
    records: RecordFile
    """The experiment's, in the folder where its runs lie too."""

    refusal: ClassVar[str]
    """What is said of a record of other settings; formatted with file, condition, different and name."""
    interrupted: ClassVar[str]
    """What is said where the runs are interrupted."""

    @property
    def folder(self) -> Path:
        return self.records.path.parent / "runs"

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder / f"{self.name}.log"

    @property
    @abstractmethod
    def path(self) -> Path:
        """What its process leaves, and what messages call the run."""

    @property
    def threads(self) -> int:
        """Of its process."""
        return 1

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether the record can be made."""

    @property
    @abstractmethod
    def share(self) -> float:
        """The share of it that is done."""

    @property
    def state(self) -> str:
        """Where it is, for the line of progress."""
        return f"{self.name} {self.share:.0%}"

    def waits(self, unfinished: Container[str]) -> bool:
        """Whether it can neither start nor be read yet, given the names of the runs without a record."""
        return False

    @abstractmethod
    def command(self) -> list[str]:
        """The module that makes it and its arguments, asked for when the process is about to start."""

    @abstractmethod
    def make_record(self) -> RunRecord:
        """The record of what the process has left."""

    @abstractmethod
    def differences(self, record: RunRecord) -> list[str]:
        """What of the settings and inputs is another there."""

    def check_inside(self) -> None:
        """Refuse files of this run that lie elsewhere than in the experiment's folder.

        Raises:
            UserError: naming the first of them.
        """
        for path in (self.path, self.log):
            check_inside(self.records.path.parent, path)

    def stored(self) -> RunRecord | None:
        """Its record, if there is one.

        Raises:
            UserError: the record is damaged, or was made with other settings.
        """
        if self.name not in self.records:
            return None
        file = self.records.path
        record = from_plain(RunRecord, self.records.rows()[self.name], where=f"{file}: {self.name}")
        if different := "; ".join(self.differences(record)):
            raise UserError(
                self.refusal.format(file=file, condition=record.condition, different=different, name=self.name)
            )
        return record

    def finish(self) -> RunRecord:
        """The record of a run that has ended, written unless it is there."""
        if (record := self.stored()) is None:
            record = self.make_record()
            self.records.append(to_plain(record))
        return record

"""The work of an experiment: how much each of its runs is, as those who look on need it to say when all is done."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepdelta.config import from_plain, to_plain
from deepdelta.files import read_object, write_json

WORK = "work.json"
"""Beside the records, for as long as the experiment is at work."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Fields:
    amounts: of every run, by name, in any unit.
    made: of their sum, what was there at the time `began`, in seconds since 1970.
    """

    amounts: dict[str, float]
    made: float
    began: float

    @classmethod
    def read(cls, path: Path) -> "Work":
        return from_plain(cls, read_object(path, "delete it"), where=str(path))

    def write(self, path: Path) -> None:
        write_json(path, to_plain(self))

    def left(self, shares: Mapping[str, float], now: float) -> float | None:
        """Seconds until all is made, at the pace since `began`; None where nothing was made since.

        Args:
            shares: of runs by name, how much of each is made, 0 to 1.
            now: in seconds since 1970.
        """
        made = sum(amount * shares.get(name, 0.0) for name, amount in self.amounts.items())
        if made <= self.made or now <= self.began:
            return None
        return (now - self.began) / (made - self.made) * (sum(self.amounts.values()) - made)

"""A study: conditions x seeds, as a typed file."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from deepdelta.config import from_plain, merged, to_plain
from deepdelta.errors import UserError, nearest
from deepdelta.training import TrainConfig

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

COMMON = frozenset({"data", "device", "precision", "threads"})
"""Settings that no condition may change."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One model of the comparison: what it is, and what it changes in the study's common settings."""

    summary: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Conditions that differ in the named changes and in nothing else, each run once per seed."""

    name: str
    question: str
    baseline: str
    seeds: tuple[int, ...]
    train: dict[str, Any]
    """Common settings, keys of TrainConfig; the seed comes from `seeds`."""
    conditions: dict[str, Condition]
    cost_rounds: int = 12
    """Interleaved rounds of the cost phase."""
    rewrite_tokens: int = 16384
    """Validation tokens per run on which gates and discrepancies are collected."""

    def __post_init__(self) -> None:
        for name in (self.name, *self.conditions):
            if not FILE_NAME.fullmatch(name):
                raise UserError(
                    f"names of studies and conditions name files: letters, digits, '.', '_' and '-' only, got '{name}'."
                )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds must be different numbers from 0 on, at least one, got {list(self.seeds)}.")
        if self.baseline not in self.conditions:
            raise UserError(
                f"baseline must be one of the conditions, got '{self.baseline}'; "
                + nearest(self.baseline, self.conditions)
            )
        for name in ("cost_rounds", "rewrite_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, condition in self.conditions.items():
            for key in COMMON & set(condition.changes):
                raise UserError(
                    f"conditions must share '{key}', or their losses or costs do not compare: move it from the "
                    f"changes of {name} to train."
                )
        if "seed" in self.train or any("seed" in condition.changes for condition in self.conditions.values()):
            raise UserError("the seed of a run comes from the study's seeds; remove 'seed' from train and changes.")
        for name in self.conditions:
            self.train_config(name, self.seeds[0])

    def train_config(self, condition: str, seed: int) -> TrainConfig:
        """The run of one condition and seed."""
        common = merged(to_plain(TrainConfig()), self.train)
        plain = merged(common, self.conditions[condition].changes) | {"seed": seed}
        return from_plain(TrainConfig, plain, where=f"study {self.name}, condition {condition}")


def named_studies() -> list[str]:
    """The studies that ship with the package."""
    folder = resources.files("deepdelta.studies") / "named"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_study(name_or_file: str, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """A named study, or the one in a TOML file, with some of its keys replaced.

    Raises:
        UserError: no such study or file, or one that does not hold a valid study.
    """
    if name_or_file.endswith(".toml"):
        file = Path(name_or_file)
        if not file.is_file():
            raise UserError(f"there is no study file {file}; named studies are: {', '.join(named_studies())}.")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not valid TOML: {error}.") from None
    elif name_or_file in named_studies():
        text = (resources.files("deepdelta.studies") / "named" / f"{name_or_file}.toml").read_text(encoding="utf-8")
    else:
        raise UserError(
            f"there is no study '{name_or_file}'; {nearest(name_or_file, named_studies())} "
            "A file of your own ends in .toml."
        )
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name_or_file} is not valid TOML: {error}.") from None
    return from_plain(StudyConfig, merged(plain, overrides or {}), where=f"study {name_or_file}")

"""What a task is: a data source, models that differ in their residual, and a number that says how well each did."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deepdelta.config import Plain, from_plain, merged, to_plain
from deepdelta.errors import UserError, nearest
from deepdelta.files import parse
from deepdelta.nn.presets import overlaid

Progress = Callable[[int, int], None]
"""progress(done, total), in steps of the run."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One condition of a task: what it is, and what it changes in the task's settings."""

    summary: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    control: str | None = None
    """The condition that it is compared with besides the baseline."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task that `deepdelta task NAME` runs: every condition once per seed.

    Fields:
        name, summary: those that the registry has.
        settings: the frozen dataclass of its settings; the instance holds the defaults.
        run: run(settings, seed, progress) -> metrics by name; the same twice for the same arguments.
        primary: the metric that conditions are compared in; `unit` says what it counts.
    """

    name: str = ""
    summary: str = ""
    settings: Any
    conditions: Mapping[str, Variant]
    baseline: str
    primary: str
    unit: str
    higher_is_better: bool
    run: Callable[[Any, int, Progress], dict[str, float]]
    refuted: str = ""
    """What would refute the hope behind it, written down before it runs; shown with its results."""
    left_out: tuple[str, ...] = ()
    """Conditions that were not chosen."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Settings that have no effect here, and the one that takes the place of each."""

    def only(self, conditions: Sequence[str]) -> "Task":
        """The task with the baseline and these conditions alone; a control that is not among them is not compared with.

        Raises:
            UserError: no condition, or none of a name.
        """
        if not conditions:
            raise UserError(f"conditions must name at least one of task {self.name}: {', '.join(self.conditions)}.")
        for name in conditions:
            self._check(name)
        kept = {name: one for name, one in self.conditions.items() if name in (self.baseline, *conditions)}
        lone = {name: one if one.control in kept else replace(one, control=None) for name, one in kept.items()}
        return replace(self, conditions=lone, left_out=tuple(name for name in self.conditions if name not in kept))

    def _check(self, condition: str) -> None:
        if condition not in self.conditions:
            raise UserError(f"task {self.name} has no condition '{condition}'; {nearest(condition, self.conditions)}")

    def settings_of(self, condition: str, overrides: Mapping[str, Any] | None = None) -> Any:
        """The settings of a condition, with some replaced in all conditions.

        Raises:
            UserError: no such condition, an unknown setting, one that the condition sets itself, or a value that it
                cannot have.
        """
        self._check(condition)
        changes = self.conditions[condition].changes
        if both := sorted(_leaves(overrides or {}) & _leaves(changes)):
            raise UserError(
                f"{both[0]} is what condition {condition} of task {self.name} sets itself, so it cannot be set for all."
            )
        for name in sorted(_leaves(overrides or {}) & set(self.replaced)):
            raise UserError(
                f"{name} has no effect in task {self.name}, where {self.replaced[name]} takes its place: set that."
            )
        plain = overlaid(to_plain(self.settings), merged(overrides or {}, changes))
        return from_plain(type(self.settings), plain, where=f"task {self.name}")


def _leaves(plain: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of all that stands in it."""
    found: set[str] = set()
    for key, value in plain.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}"}
    return found


def read_overrides(given: Sequence[str]) -> Plain:
    """Settings given as KEY=VALUE; the key dotted where settings lie in settings, the value TOML or else a text.

    Raises:
        UserError: no such form.
    """
    found: Plain = {}
    for one in given:
        key, equals, value = one.partition("=")
        read = _toml(one) or _toml(f"{key}={json.dumps(value)}")
        if not equals or not read:
            raise UserError(f"settings are given as KEY=VALUE, such as steps=2000, got '{one}'.")
        found = merged(found, read)
    return found


def _toml(line: str) -> Plain | None:
    try:
        return parse(line, line, "give another value", toml=True)  # type: ignore[no-any-return]
    except UserError:
        return None

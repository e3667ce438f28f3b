"""A task from its name to results: a run per condition and seed, made by the pool that studies use too."""

import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.device import keep_freed_memory
from deepdelta.errors import UserError, require
from deepdelta.files import AnyPath, locked, read_object, write_json, write_text
from deepdelta.lab.analysis.tasks import TaskResults
from deepdelta.lab.experiments.places import Places
from deepdelta.lab.experiments.pool import Claimed, running
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.experiments.run import Run
from deepdelta.lab.tasks.fitting import Diverged
from deepdelta.lab.tasks.registry import load_task
from deepdelta.lab.tasks.results import collect
from deepdelta.lab.views.tables import render
from deepdelta.lab.views.tasks import task_markdown, task_tables
from deepdelta.progress import show
from deepdelta.provenance import commit, machine, now, versions

UNITS = 100
"""Parts of a run in which its progress is counted."""

LINES = 4096
"""Bytes at the end of a log in which a run's progress is looked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRun(Run):
    """A run of a task; its process writes its record to `path`."""

    settings: dict[str, Any]

    refusal: ClassVar[str] = "{file}: {name} was made with other settings ({different}); give another --out."
    interrupted: ClassVar[str] = "Finished runs are kept; the same command continues with what is missing."

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def ended(self) -> bool:
        return self.path.exists()

    @property
    def share(self) -> float:
        """As its process printed last."""
        printed = re.findall(rb"^\d+$", self.log.read_bytes()[-LINES:], re.MULTILINE) if self.log.exists() else []
        return int(printed[-1]) / UNITS if printed else 0.0

    def command(self) -> list[str]:
        self.folder.mkdir(exist_ok=True)
        self.log.unlink(missing_ok=True)  # what it says of progress is of the last process
        given = {key: getattr(self, key) for key in ("name", "experiment", "condition", "seed", "settings")}
        return ["deepdelta.lab.tasks.runner", json.dumps(given | {"path": str(self.path)})]

    def differences(self, record: RunRecord) -> list[str]:
        """Stored settings are read as the task's first: where it gained a field since, they hold its default."""
        if record.experiment != self.experiment:
            return [f"the task {record.experiment}"]
        task = load_task(self.experiment)
        if record.diverged is None and task.primary not in record.metrics:
            return [f"it measured no {task.primary}"]
        where = f"{self.records.path}: {self.name}: settings"
        try:
            there = from_plain(type(task.settings), record.settings, where=where)
        except UserError as error:  # written by another version
            return [str(error)]
        return differences(to_plain(there), self.settings)

    def make_record(self) -> RunRecord:
        return from_plain(RunRecord, read_object(self.path, "delete it to make that run again"), where=str(self.path))

    def finish(self) -> RunRecord:
        record = super().finish()
        self.path.unlink(missing_ok=True)
        return record


def run_task(
    name: str,
    seeds: Sequence[int],
    out: AnyPath,
    *,
    overrides: Mapping[str, Any] | None = None,
    conditions: Sequence[str] | None = None,
    workers: int | None = None,
    command: str = "",
) -> TaskResults:
    """Run every condition of a task once per seed; what has a record in `out` is not run again.

    Args:
        overrides: settings replaced in all conditions.
        conditions: which of them, the baseline besides; None: all.
        workers: processes side by side; None: one per usable core.

    Raises:
        UserError: an unknown task or setting, seeds that are not different, a file of other settings or another process
            at work in `out`, a run failed (its own message is passed on), or the extra `lab` is absent.
        KeyboardInterrupt: interrupted; the same command continues with what is missing.
    """
    task = load_task(name)
    task = task if conditions is None else task.only(conditions)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be different numbers from 0 on, at least one, got {list(seeds)}.")
    places = Places(workers=workers).settled("cpu", 1)
    require("comparisons of tasks", "lab", "scipy")
    settings = {condition: to_plain(task.settings_of(condition, overrides)) for condition in task.conditions}
    out = Path(out)
    with locked(out):
        file = RecordFile(out)
        # Seed by seed, so that what is interrupted has whole pairs.
        runs = [
            TaskRun(
                name=f"{condition}-seed{seed}",
                experiment=name,
                condition=condition,
                seed=seed,
                records=file,
                settings=settings[condition],
            )
            for seed in seeds
            for condition in task.conditions
        ]
        records = {run.name: record for run in runs if (record := run.stored()) is not None}
        claimed = Claimed([run for run in runs if run.name not in records], records)
        with running(f"Task {name}", [(run, float(UNITS)) for run in runs], "% of a run", places) as runner:
            records = runner.make(claimed, "runs")
        file.compact()
        results = collect(task, seeds, {(one.condition, one.seed): one for one in records.values()}, command)
        results.save(out / "results.json")
        write_text(out / "table.md", task_markdown(results))
    for table in task_tables(results)[:2]:
        Console().print(render(table))
    show(f"Results and table: {out}")
    return results


def default_folder(name: str, given: Sequence[str] = ()) -> Path:
    """Where a task's results go by default; a task with other settings goes elsewhere."""
    return Path("runs") / re.sub(r"[^\w.,-]+", "-", "-".join((f"task-{name}", *given)))


def make_run(name: str, experiment: str, condition: str, seed: int, settings: dict[str, Any], path: str) -> None:
    """Make a run in this process, print after every part of it how many are done, and write its record to `path`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    task, last = load_task(experiment), 0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if (share := min(UNITS - 1, UNITS * done // total)) > last:
            last = share
            print(share, flush=True)

    began, found, diverged = time.perf_counter(), dict[str, float](), None
    try:
        found = task.run(from_plain(type(task.settings), settings), seed, progress)
    except Diverged as error:
        diverged = str(error)
    record = RunRecord(
        name=name,
        kind="task",
        experiment=experiment,
        condition=condition,
        seed=seed,
        settings=settings,
        metrics={name: value if math.isfinite(value) else None for name, value in found.items()},
        diverged=diverged,
        seconds=round(time.perf_counter() - began, 3),
        commit=commit(),
        versions=versions(),
        machine=machine(),
        threads=1,
        finished=now(),
    )
    write_json(Path(path), to_plain(record))


if __name__ == "__main__":
    make_run(**json.loads(sys.argv[1]))

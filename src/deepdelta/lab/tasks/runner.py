"""All of a task's runs: processes of one thread side by side, each recorded the moment it ends."""

import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.device import keep_freed_memory, usable_cores
from deepdelta.errors import UserError, require
from deepdelta.files import AnyPath, locked, read_object, write_json, write_text
from deepdelta.lab.analysis.tasks import TaskResults
from deepdelta.lab.experiments.pool import Job, run_jobs
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.tasks.fitting import Diverged
from deepdelta.lab.tasks.registry import load_task
from deepdelta.lab.tasks.results import TaskRecord, collect
from deepdelta.lab.tasks.task import Task
from deepdelta.lab.views.tables import render
from deepdelta.lab.views.tasks import task_markdown, task_tables
from deepdelta.progress import reporting, show
from deepdelta.provenance import commit, machine, now, versions
from deepdelta.training.loop import stop_signals

UNITS = 100
"""Parts of a run in which its progress is counted."""

LINES = 4096
"""Bytes at the end of a log in which a run's progress is looked for."""


def run_task(
    name: str,
    seeds: Sequence[int],
    out: AnyPath,
    *,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    command: str = "",
) -> TaskResults:
    """Run every condition of a task once per seed; what has a record in `out` is not run again.

    Args:
        overrides: settings replaced in all conditions.
        workers: processes side by side; None: one per usable core.

    Raises:
        UserError: an unknown task or setting, seeds that are not different, a file of other settings or another process
            at work in `out`, a run failed (its own message is passed on), or the extra `study` is absent.
        KeyboardInterrupt: interrupted; the same command continues with what is missing.
    """
    task = load_task(name)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be different numbers from 0 on, at least one, got {list(seeds)}.")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}.")
    require("comparisons of tasks", "study", "scipy")
    settings = {condition: to_plain(task.settings_of(condition, overrides)) for condition in task.conditions}
    out = Path(out)
    with locked(out):
        # Seed by seed, so that what is interrupted has whole pairs.
        file = RecordFile(out)
        jobs = [_job(task, name, seed, settings[name], file) for seed in seeds for name in task.conditions]
        records = {job.name: job.record() for job in jobs if job.ended()}
        _run([job for job in jobs if job.name not in records], records, task, workers or usable_cores())
        file.compact()
        results = collect(task, seeds, {(one.condition, one.seed): one for one in records.values()}, command)
        write_json(out / "results.json", to_plain(results))
        write_text(out / "table.md", task_markdown(results))
    console = Console()
    for table in task_tables(results)[:2]:
        console.print(render(table))
    show(f"Results and table: {out}")
    return results


def default_folder(name: str, given: Sequence[str] = ()) -> Path:
    """Where a task's results go by default; a task with other settings goes elsewhere."""
    return Path("runs") / re.sub(r"[^\w.,-]+", "-", "-".join((f"task-{name}", *given)))


def _run(jobs: Sequence[Job[TaskRecord]], records: dict[str, TaskRecord], task: Task, workers: int) -> None:
    if not jobs:
        return

    def watch(waiting: Sequence[Job[Any]], running: Sequence[Job[Any]]) -> None:
        finished = len(jobs) - len(waiting) - len(running)
        reporter.update(finished * UNITS + sum(_share(job.log) for job in running), f"{finished} of {len(jobs)} runs")

    with stop_signals() as stopped, reporting(f"Task {task.name}", len(jobs) * UNITS) as reporter:
        try:
            run_jobs(jobs, records, workers=workers, stopped=stopped, watch=watch)
        except KeyboardInterrupt:
            reporter.note("Finished runs are kept; the same command continues with what is missing.")
            raise


def _record_name(condition: str, seed: int) -> str:
    return f"{condition}-seed{seed}"


def _job(task: Task, condition: str, seed: int, settings: dict[str, Any], records: RecordFile) -> Job[TaskRecord]:
    name, runs = _record_name(condition, seed), records.path.parent / "runs"
    path, log = runs / f"{name}.json", runs / f"{name}.log"

    def command() -> list[str]:
        log.parent.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)  # what it says of progress is of the last process
        given = {"name": task.name, "condition": condition, "seed": seed, "settings": settings, "path": str(path)}
        return ["deepdelta.lab.tasks.runner", json.dumps(given)]

    def record() -> TaskRecord:
        if name not in records:
            plain = read_object(path, "delete it to make that run again")
            made = _checked(plain, str(path), task, settings)
            records.append(to_plain(made))
            path.unlink()
        return _checked(records.rows()[name], f"{records.path}: {name}", task, settings)

    return Job(
        name=name,
        place=path,
        command=command,
        ended=lambda: name in records or path.exists(),
        record=record,
        log=log,
    )


def _share(log: Path) -> int:
    """How many parts of a run are done, as its process printed last."""
    printed = re.findall(rb"^\d+$", log.read_bytes()[-LINES:], re.MULTILINE) if log.exists() else []
    return int(printed[-1]) if printed else 0


def _checked(plain: dict[str, Any], where: str, task: Task, settings: dict[str, Any]) -> TaskRecord:
    record = from_plain(TaskRecord, plain, where=where)
    if record.task != task.name or (different := differences(record.settings, settings)):
        reason = f"the task {record.task}" if record.task != task.name else "; ".join(different)
        raise UserError(f"{where} was made with other settings ({reason}); give another --out.")
    return record


def make_record(name: str, condition: str, seed: int, settings: dict[str, Any], path: str) -> None:
    """Make a run in this process, print after every part of it how many are done, and write its record to `path`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    task, last = load_task(name), 0

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
    record = TaskRecord(
        name=_record_name(condition, seed),
        task=name,
        condition=condition,
        seed=seed,
        settings=settings,
        metrics={name: value if math.isfinite(value) else None for name, value in found.items()},
        seconds=round(time.perf_counter() - began, 3),
        commit=commit(),
        versions=versions(),
        machine=machine(),
        finished=now(),
        diverged=diverged,
    )
    write_json(Path(path), to_plain(record))


if __name__ == "__main__":
    make_record(**json.loads(sys.argv[1]))

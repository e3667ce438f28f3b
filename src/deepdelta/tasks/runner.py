"""All of a task's runs: processes of one thread side by side, each turned into a file the moment it ends."""

import math
import multiprocessing
import re
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.errors import UserError
from deepdelta.files import check_folder, read_object, write_json, write_text
from deepdelta.studies.cells import MEND
from deepdelta.tasks.registry import load_task
from deepdelta.tasks.results import TaskCell, TaskResults, conditions_of, markdown, table
from deepdelta.tasks.task import Task
from deepdelta.training.environment import commit, keep_freed_memory, machine, now, provenance, usable_cores, versions
from deepdelta.training.progress import reporting, show

POLL_SECONDS = 0.5
UNITS = 100
"""Parts of a run in which its progress is counted."""


def run_task(
    name: str,
    seeds: Sequence[int],
    out: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    command: str = "",
) -> TaskResults:
    """Run every condition of a task once per seed; what has its file in `out/cells` is not run again.

    Args:
        overrides: settings replaced in all conditions.
        workers: processes side by side; None: one per usable core.

    Raises:
        UserError: an unknown task or setting, seeds that are not different, or a file of other settings in `out`.
    """
    task = load_task(name)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be different numbers from 0 on, at least one, got {list(seeds)}.")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}.")
    check_folder(out)
    settings = {condition: to_plain(task.settings_of(condition, overrides)) for condition in task.conditions}
    # Seed by seed, so that what is interrupted has whole pairs.
    wanted = [(condition, seed) for seed in seeds for condition in task.conditions]
    cells = {key: cell for key in wanted if (cell := _read(task, *key, settings[key[0]], out)) is not None}
    _run([key for key in wanted if key not in cells], task, settings, out, workers or usable_cores(), cells)
    results = TaskResults(
        task=task.name,
        summary=task.summary,
        primary=task.primary,
        unit=task.unit,
        higher_is_better=task.higher_is_better,
        baseline=task.baseline,
        seeds=tuple(seeds),
        **provenance(command),
        finished=now(),
        conditions=conditions_of(task, cells),
    )
    write_json(out / "results.json", to_plain(results))
    write_text(out / "table.md", markdown(results))
    console = Console()
    console.print(table(results))
    show(f"Results and table: {out}")
    return results


def default_folder(name: str, given: Sequence[str] = ()) -> Path:
    """Where a task's results go by default; a task with other settings goes elsewhere."""
    return Path("runs") / re.sub(r"[^\w.,-]+", "-", "-".join((f"task-{name}", *given)))


def _run(
    todo: Sequence[tuple[str, int]],
    task: Task,
    settings: Mapping[str, dict[str, Any]],
    out: Path,
    workers: int,
    cells: dict[tuple[str, int], TaskCell],
) -> None:
    if not todo:
        return
    spawning = multiprocessing.get_context("spawn")
    with (
        spawning.Manager() as manager,
        reporting(f"Task {task.name}", len(todo) * UNITS) as reporter,
        ProcessPoolExecutor(min(workers, len(todo)), mp_context=spawning, initializer=_alone) as pool,
    ):
        shares, stopped = manager.dict(), manager.Event()
        waiting: dict[Future[TaskCell], tuple[str, int]] = {}
        try:
            for condition, seed in todo:
                run = pool.submit(_cell, task.name, condition, seed, settings[condition], shares, stopped)
                waiting[run] = condition, seed
            while waiting:
                done, _ = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    key = waiting.pop(future)
                    cells[key] = future.result()
                    write_json(_path(out, *key), to_plain(cells[key]))
                finished = len(todo) - len(waiting)
                units = finished * UNITS + sum(shares.get(key, 0) for key in waiting.values())
                reporter.update(units, f"{finished} of {len(todo)} runs")
        except BrokenProcessPool:
            raise UserError("a run was ended from outside; the same command continues with what is missing.") from None
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _alone() -> None:
    # Ctrl-C reaches the runs once, through `stopped`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()


def _cell(name: str, condition: str, seed: int, settings: dict[str, Any], shares: Any, stopped: Any) -> TaskCell:
    task = load_task(name)
    last = -1

    def progress(done: int, total: int) -> None:
        nonlocal last
        if (share := min(UNITS - 1, UNITS * done // total)) > last:
            if stopped.is_set():
                raise KeyboardInterrupt
            shares[condition, seed] = last = share

    began = time.perf_counter()
    found = task.run(from_plain(type(task.settings), settings), seed, progress)
    return TaskCell(
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
    )


def _read(task: Task, condition: str, seed: int, settings: dict[str, Any], out: Path) -> TaskCell | None:
    path = _path(out, condition, seed)
    if not path.exists():
        return None
    cell = from_plain(TaskCell, read_object(path, MEND), where=str(path))
    if cell.task != task.name or (different := differences(cell.settings, settings)):
        reason = f"the task {cell.task}" if cell.task != task.name else "; ".join(different)
        raise UserError(f"{path} was made with other settings ({reason}); give another --out, or delete that file.")
    return cell


def _path(out: Path, condition: str, seed: int) -> Path:
    return out / "cells" / f"{condition}-seed{seed}.json"

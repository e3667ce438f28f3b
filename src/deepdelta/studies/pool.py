"""Runs side by side as processes of their own, each turned into its cell the moment it ends.

Every run is an ordinary run directory, so what was interrupted goes on from its checkpoint; what has a cell is done.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.errors import UserError
from deepdelta.files import read_object, write_json
from deepdelta.studies.cells import Cell, canonical, make_cell, read_cell, write_cell
from deepdelta.studies.config import StudyConfig
from deepdelta.studies.plan import Run, starts, untrained
from deepdelta.training import RunDirectory, TrainConfig
from deepdelta.training.loop import resolve, stop_signals
from deepdelta.training.progress import Reporter, reporting

POLL_SECONDS = 0.5


def claim(runs: Iterable[Run]) -> dict[str, Cell]:
    """The cells that are there already, by name, those of starts too, after a look at all that must not be there.

    Raises:
        UserError: a cell or an unfinished run of another configuration or corpus is in the way.
    """
    cells = {}
    runs = list(runs)
    for run in (*starts(runs).values(), *runs):
        start = run.start_settings
        cell = read_cell(run.cell, run.settings, run.corpus, start)
        if cell is not None:
            cells[run.name] = cell
        elif run.launched.exists():
            launched = read_object(run.launched, "delete it and its run to run it again")
            there = from_plain(TrainConfig, launched, where=str(run.launched))
            different = differences(to_plain(there), to_plain(run.settings))
            if run.begun:
                here = None if start is None else canonical(resolve(start, run.corpus))
                different += differences({"start": _began(run)}, {"start": here})
            if different:
                raise UserError(
                    f"{run.out} already holds this study with other settings of {run.condition} "
                    f"({'; '.join(different)}) in {run.path}; give another --out, or delete that run."
                )
    return cells


@dataclass
class Pool:
    """Trains what has no cell, `workers` processes at a time; made by `pool`."""

    config: StudyConfig
    workers: int
    work: dict[str, float]
    """Expected seconds of every run of the study, by name."""
    done: set[str]
    """Names of the runs that have a cell."""
    stopped: Callable[[], bool]
    reporter: Reporter

    def train(self, runs: Iterable[Run], phase: str) -> dict[str, Cell]:
        """The cells of these runs, by name, those that are missing made first.

        Raises:
            UserError: a run failed (its own message is passed on), or `claim` refuses.
            KeyboardInterrupt: interrupted; every run has saved its step.
        """
        wanted = list({run.name: run for run in runs}.values())
        cells, first = claim(wanted), starts(wanted)
        waiting = [*untrained(wanted), *(run for run in wanted if run.name not in cells)]
        self.done -= {run.name for run in waiting}
        running: dict[Run, subprocess.Popen[bytes]] = {}
        try:
            while (waiting or running) and not self.stopped():
                for run in list(waiting):
                    # A busy run is still trained by a process of a study that was killed: it is waited for.
                    if RunDirectory(run.path).busy or _needs(run, (*waiting, *running)):
                        continue
                    if run.name in first and run.ended and not run.weights.exists():
                        shutil.rmtree(run.path)
                    if run.ended:
                        waiting.remove(run)
                        cells[run.name] = self._finish(run, first)
                    elif len(running) < self.workers:
                        _check_start(run, cells)
                        waiting.remove(run)
                        running[run] = _launch(run)
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        if not run.ended:
                            raise UserError(_failure(run, process.returncode))
                        cells[run.name] = self._finish(run, first)
                self._report([*waiting, *running], phase)
                if waiting or running:
                    time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
        if self.stopped():
            self.reporter.note("Every run has saved its step; the same command continues the study.")
            raise KeyboardInterrupt
        if not self.config.keep_checkpoints:
            for run in first.values():
                run.weights.unlink(missing_ok=True)
        return cells

    def _finish(self, run: Run, kept: Container[str]) -> Cell:
        """The cell of a run that has ended, written unless it is there; others may start from the weights in `kept`."""
        self.done.add(run.name)
        if (cell := read_cell(run.cell, run.settings, run.corpus, run.start_settings)) is not None:
            return cell
        threads = torch.get_num_threads()
        torch.set_num_threads(run.settings.threads or 1)
        try:
            cell = make_cell(
                run.name,
                run.condition,
                run.path,
                run.settings,
                run.corpus,
                start=run.start_settings,
                rewrite_tokens=0 if run.settings.data.held_out == "train_tail" else self.config.rewrite_tokens,
            )
        finally:
            torch.set_num_threads(threads)
        write_cell(cell, run.cell)
        if not self.config.keep_checkpoints and run.name not in kept:
            run.weights.unlink()
        return cell

    def _report(self, unfinished: Sequence[Run], phase: str) -> None:
        made = _made(self.work, self.done, unfinished)
        self.reporter.update(made, f"s of work, {len(self.done)}/{len(self.work)} cells ({phase})")


@contextmanager
def pool(config: StudyConfig, workers: int, planned: Iterable[Run]) -> Iterator[Pool]:
    """A pool for a study that consists of the planned runs.

    Progress counts seconds of expected work over all phases of the study; the time left follows from the pace at which
    such work was done since the command began.
    """
    planned = list(planned)
    begun_from, again = starts(planned), {run.name for run in untrained(planned)}
    runs = begun_from | {run.name: run for run in planned}
    work = {name: run.work for name, run in runs.items()}
    done = {name for name, run in runs.items() if name not in again and (name in begun_from or run.cell.exists())}
    first = _made(work, done, [run for name, run in runs.items() if name not in done])
    total = _made(work, set(work), [])
    with stop_signals() as stopped, reporting(f"Study {config.name}", total, first) as reporter:
        yield Pool(config, workers, work, done, stopped, reporter)


def _made(work: dict[str, float], done: set[str], unfinished: Iterable[Run]) -> int:
    """Seconds of work behind us; at least one when all of it is, however short the study."""
    parts = sum(run.work * RunDirectory(run.path).last_recorded_step() / run.settings.steps for run in unfinished)
    seconds = sum(work[name] for name in done if name in work) + parts
    return max(1, round(seconds)) if len(done) == len(work) else int(seconds)


def _began(run: Run) -> dict[str, Any] | None:
    """How the weights that a run began with were trained; None where they were new."""
    plain = RunDirectory(run.path).environment().get("init_config")
    return None if plain is None else canonical(from_plain(TrainConfig, plain, where=str(run.path)))


def _needs(run: Run, unfinished: Iterable[Run]) -> bool:
    """Whether a run has yet to wait for the one that it starts from."""
    return run.start is not None and not run.begun and run.start.name in {one.name for one in unfinished}


def _check_start(run: Run, cells: Mapping[str, Cell]) -> None:
    if run.start is not None and not run.begun and cells[run.start.name].validation_loss is None:
        raise UserError(f"{run.start.path} diverged, and no run can start from it: lower lr in the study's start.")


def _command(run: Run) -> list[str]:
    start = [] if run.start is None or run.begun else ["--init-from", str(run.start.path)]
    return [sys.executable, "-m", "deepdelta", "train", "--config", str(run.launched), "--run", str(run.path), *start]


def _launch(run: Run) -> subprocess.Popen[bytes]:
    write_json(run.launched, to_plain(run.settings))
    threads = str(run.settings.threads or 1)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with run.log.open("ab") as log:
        # In a session of its own, so that Ctrl-C reaches the runs once, through us, after their step is finished.
        return subprocess.Popen(_command(run), stdout=log, stderr=log, env=environment, start_new_session=True)


def _failure(run: Run, code: int) -> str:
    if code < 0:
        return f"the run {run.path} was ended by {signal.Signals(-code).name}; the same command continues the study."
    lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"the run {run.path} failed: {lines[-1] if lines else f'exit code {code}'} (all of it: {run.log})"

"""Runs side by side as processes of their own, each turned into its cell the moment it ends.

Every run is an ordinary run directory, so what was interrupted goes on from its checkpoint; what has a cell is done.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.errors import UserError
from deepdelta.files import write_json
from deepdelta.studies.cells import Cell, make_cell, read_cell, write_cell
from deepdelta.studies.config import StudyConfig
from deepdelta.studies.plan import Run
from deepdelta.training import RunDirectory, TrainConfig
from deepdelta.training.loop import stop_signals
from deepdelta.training.progress import Reporter, reporting
from deepdelta.training.rundir import CHECKPOINT

POLL_SECONDS = 0.5


def claim(runs: Iterable[Run]) -> dict[str, Cell]:
    """The cells that are there already, by name, after a look at all that must not be there.

    Raises:
        UserError: a cell or an unfinished run of another configuration or corpus is in the way.
    """
    cells = {}
    for run in runs:
        cell = read_cell(run.cell, run.settings, run.corpus)
        if cell is not None:
            cells[run.name] = cell
        elif run.launched.exists():
            there = from_plain(
                TrainConfig, json.loads(run.launched.read_text(encoding="utf-8")), where=str(run.launched)
            )
            if different := differences(to_plain(there), to_plain(run.settings)):
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
        cells = claim(wanted)
        waiting = [run for run in wanted if run.name not in cells]
        running: dict[Run, subprocess.Popen[bytes]] = {}
        try:
            while (waiting or running) and not self.stopped():
                for run in list(waiting):
                    # A busy run is still trained by a process of a study that was killed: it is waited for.
                    if RunDirectory(run.path).busy:
                        continue
                    if run.ended:
                        waiting.remove(run)
                        cells[run.name] = self._finish(run)
                    elif len(running) < self.workers:
                        waiting.remove(run)
                        running[run] = _launch(run)
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        if not run.ended:
                            raise UserError(_failure(run, process.returncode))
                        cells[run.name] = self._finish(run)
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
        return cells

    def _finish(self, run: Run) -> Cell:
        threads = torch.get_num_threads()
        torch.set_num_threads(run.settings.threads or 1)
        try:
            cell = make_cell(
                run.name,
                run.condition,
                run.path,
                run.settings,
                run.corpus,
                rewrite_tokens=0 if run.settings.data.held_out == "train_tail" else self.config.rewrite_tokens,
            )
        finally:
            torch.set_num_threads(threads)
        write_cell(cell, run.cell)
        if not self.config.keep_checkpoints:
            (run.path / CHECKPOINT).unlink()
        self.done.add(run.name)
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
    runs = {run.name: run for run in planned}
    work = {name: run.work for name, run in runs.items()}
    done = {name for name, run in runs.items() if run.cell.exists()}
    first = _made(work, done, [run for name, run in runs.items() if name not in done])
    total = _made(work, set(work), [])
    with stop_signals() as stopped, reporting(f"Study {config.name}", total, first) as reporter:
        yield Pool(config, workers, work, done, stopped, reporter)


def _made(work: dict[str, float], done: set[str], unfinished: Iterable[Run]) -> int:
    """Seconds of work behind us; at least one when all of it is, however short the study."""
    parts = sum(run.work * RunDirectory(run.path).last_recorded_step() / run.settings.steps for run in unfinished)
    seconds = sum(work[name] for name in done if name in work) + parts
    return max(1, round(seconds)) if len(done) == len(work) else int(seconds)


def _launch(run: Run) -> subprocess.Popen[bytes]:
    write_json(run.launched, to_plain(run.settings))
    command = [sys.executable, "-m", "deepdelta", "train", "--config", str(run.launched), "--run", str(run.path)]
    threads = str(run.settings.threads or 1)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with run.log.open("ab") as log:
        # In a session of its own, so that Ctrl-C reaches the runs once, through us, after their step is finished.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _failure(run: Run, code: int) -> str:
    if code < 0:
        return f"the run {run.path} was ended by {signal.Signals(-code).name}; the same command continues the study."
    lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"the run {run.path} failed: {lines[-1] if lines else f'exit code {code}'} (all of it: {run.log})"

"""Run a study: its runs side by side as processes of their own, then costs, then results and report.

Every run is an ordinary run directory, so a study that was interrupted continues: finished runs are kept, unfinished
ones go on from their checkpoints.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deepdelta.config import differences, to_plain
from deepdelta.data import check_context, load_corpus
from deepdelta.errors import UserError
from deepdelta.files import write_json
from deepdelta.report import render_table, write_report
from deepdelta.studies.collection import collect, measure
from deepdelta.studies.config import StudyConfig
from deepdelta.studies.results import StudyResults, save_results
from deepdelta.training import RunDirectory, TrainConfig
from deepdelta.training.environment import choose_device
from deepdelta.training.loop import stop_signals
from deepdelta.training.progress import reporting

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Run:
    """One cell of a study."""

    condition: str
    seed: int
    path: Path

    @property
    def settings(self) -> Path:
        """The configuration that the run was launched with."""
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def ended(self) -> bool:
        """Finished, or stopped because its loss was no longer finite, which is a result too."""
        rows = RunDirectory(self.path).metrics()
        return any(row.get("final") or row.get("diverged") for row in rows)


def run_study(config: StudyConfig, out: Path, *, workers: int | None = None, command: str) -> StudyResults:
    """Run what is missing of a study in `out`, then write results.json and report.html there and print the table.

    Args:
        workers: runs side by side; None: as many as the cores have room for at the study's threads per run.
        command: the command that was typed, kept with the results.

    Raises:
        UserError: `out` holds another study, a run failed (its own message is passed on), or workers < 1.
        KeyboardInterrupt: interrupted; every run has saved its step and the same command continues.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}.")
    console = Console()
    settings = config.train_config(config.baseline, config.seeds[0])
    corpus = load_corpus(settings.data, progress=console.print)
    choose_device(settings.device, settings.precision)
    for name in config.conditions:
        check_context(corpus, config.train_config(name, config.seeds[0]).model.context)
    # From here on there are files: what can be refused has been.
    runs = [Run(name, seed, out / "runs" / f"{name}-seed{seed}") for seed in config.seeds for name in config.conditions]
    _claim(config, runs, out)
    started = datetime.datetime.now(datetime.UTC)
    _run_all(config, runs, workers or max(1, (os.cpu_count() or 1) // (settings.threads or 1)), len(corpus.validation))
    costs = measure(config, settings.model.vocab_size or corpus.vocab_size, out / "costs.json")
    cells = {(run.condition, run.seed): run.path for run in runs}
    results = collect(config, cells, costs, corpus, command=command, started=started)
    save_results(results, out / "results.json")
    write_report(results, out / "report.html")
    console.print(render_table(results))
    console.print(f"Results: {out / 'results.json'}\nReport:  {out / 'report.html'}", highlight=False, soft_wrap=True)
    return results


def _claim(config: StudyConfig, runs: list[Run], out: Path) -> None:
    """Make `out` this study's folder; seeds and conditions may be added later, what has run may not change."""
    file = out / "study.json"
    if file.exists():
        name = json.loads(file.read_text(encoding="utf-8"))["name"]
        if name != config.name:
            raise UserError(f"{out} already holds the study '{name}'; give another --out.")
    for run in runs:
        if run.settings.exists():
            there = json.loads(run.settings.read_text(encoding="utf-8"))
            if different := differences(there, to_plain(config.train_config(run.condition, run.seed))):
                raise UserError(
                    f"{out} already holds this study with other settings of {run.condition} ({'; '.join(different)}); "
                    "give another --out."
                )
    write_json(file, to_plain(config))


def _work(settings: TrainConfig, validation_tokens: int) -> int:
    """A run's length in steps, its final validation counted as the steps that take as long."""
    tokens = min(settings.final_eval_tokens or validation_tokens, validation_tokens)
    return settings.steps + tokens // (3 * settings.tokens_per_step)


def _run_all(config: StudyConfig, runs: list[Run], workers: int, validation_tokens: int) -> None:
    """Train what has not ended, `workers` processes at a time."""
    work = {run: _work(config.train_config(run.condition, run.seed), validation_tokens) for run in runs}
    waiting = [run for run in runs if not run.ended]
    running: dict[Run, subprocess.Popen[bytes]] = {}
    unfinished = set(waiting)

    def made() -> int:
        return sum(RunDirectory(run.path).last_recorded_step() if run in unfinished else work[run] for run in runs)

    with stop_signals() as stopped, reporting(f"Study {config.name}", sum(work.values()), made()) as reporter:
        try:
            while (waiting or running) and not stopped():
                # A busy run is still trained by a process of a study that was killed: it is waited for.
                free = [run for run in waiting if not RunDirectory(run.path).busy]
                for run in free[: workers - len(running)]:
                    waiting.remove(run)
                    if run.ended:
                        unfinished.discard(run)
                    else:
                        running[run] = _launch(config, run)
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        if not run.ended:
                            raise UserError(_failure(run, process.returncode))
                        unfinished.discard(run)
                reporter.update(made(), f"{len(runs) - len(unfinished)}/{len(runs)} runs")
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
        if stopped():
            reporter.note("Every run has saved its step; the same command continues the study.")
            raise KeyboardInterrupt


def _launch(config: StudyConfig, run: Run) -> subprocess.Popen[bytes]:
    settings = config.train_config(run.condition, run.seed)
    write_json(run.settings, to_plain(settings))
    command = [sys.executable, "-m", "deepdelta", "train", "--config", str(run.settings), "--run", str(run.path)]
    threads = str(settings.threads or 1)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with run.log.open("ab") as log:
        # In a session of its own, so that Ctrl-C reaches the runs once, through us, after their step is finished.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _failure(run: Run, code: int) -> str:
    if code < 0:
        return f"the run {run.path} was ended by {signal.Signals(-code).name}; the same command continues the study."
    lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"the run {run.path} failed: {lines[-1] if lines else f'exit code {code}'} (all of it: {run.log})"

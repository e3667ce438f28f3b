"""The runs of a study as jobs of the pool, each turned into its record the moment it ends.

Every run is an ordinary run directory, so what was interrupted goes on from its checkpoint; what has a record is done.
"""

import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.errors import UserError
from deepdelta.files import read_object, write_json
from deepdelta.lab.experiments.config import StudyConfig
from deepdelta.lab.experiments.plan import Run, starts, untrained
from deepdelta.lab.experiments.pool import Job, run_jobs
from deepdelta.lab.experiments.record import RunRecord, canonical, make_record, stored_record, validated
from deepdelta.progress import Reporter, reporting
from deepdelta.training import RunDirectory, TrainConfig
from deepdelta.training.loop import resolve, stop_signals

SHOWN = 2
"""Of the runs at work, those whose loss the line of progress shows."""


def claim(runs: Iterable[Run]) -> dict[str, RunRecord]:
    """The records that are there already, by name, those of starts too, after a look at all that must not be there.

    Raises:
        UserError: a record or an unfinished run of another configuration or corpus is in the way.
    """
    records = {}
    runs = list(runs)
    for run in (*starts(runs).values(), *runs):
        start = run.start_settings
        record = stored_record(run.records, run.name, run.settings, run.corpus, start)
        if record is not None:
            records[run.name] = record
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
    return records


@dataclass
class StudyRuns:
    """Trains what has no record, `workers` processes at a time; made by `study_runs`."""

    config: StudyConfig
    workers: int
    work: dict[str, float]
    """Expected seconds of every run of the study, by name."""
    done: set[str]
    """Names of the runs that have a record."""
    stopped: Callable[[], bool]
    reporter: Reporter

    def train(self, runs: Iterable[Run], phase: str) -> dict[str, RunRecord]:
        """The records of these runs, by name, those that are missing made first.

        Raises:
            UserError: a run failed (its own message is passed on), or `claim` refuses.
            KeyboardInterrupt: interrupted; every run has saved its step.
        """
        wanted = list({run.name: run for run in runs}.values())
        records, first = claim(wanted), starts(wanted)
        missing = [*untrained(wanted), *(run for run in wanted if run.name not in records)]
        _check_validations(missing, records)
        for run in missing:
            if run.name in first and run.ended and not run.weights.exists():
                shutil.rmtree(run.path)
        self.done -= {run.name for run in missing}
        by_name = {run.name: run for run in missing}

        def watch(waiting: Sequence[Job[Any]], running: Sequence[Job[Any]]) -> None:
            self._report([by_name[job.name] for job in (*running, *waiting)], len(running), phase)

        jobs = [self._job(run, records, first) for run in missing]
        try:
            run_jobs(jobs, records, workers=self.workers, stopped=self.stopped, watch=watch)
        except KeyboardInterrupt:
            self.reporter.note("Every run has saved its step; the same command continues the study.")
            raise
        if not self.config.keep_checkpoints:
            for run in first.values():
                run.weights.unlink(missing_ok=True)
        return records

    def _job(self, run: Run, records: Mapping[str, RunRecord], kept: Container[str]) -> Job[RunRecord]:
        return Job(
            name=run.name,
            place=run.path,
            command=partial(_command, run, records),
            ended=lambda: run.ended,
            record=partial(self._record, run, kept),
            log=run.log,
            threads=run.settings.threads or 1,
            waits=partial(_waits, run),
        )

    def _record(self, run: Run, kept: Container[str]) -> RunRecord:
        """The record of a run that has ended, written unless it is there; runs in `kept` keep their weights."""
        self.done.add(run.name)
        if (record := stored_record(run.records, run.name, run.settings, run.corpus, run.start_settings)) is not None:
            return record
        threads = torch.get_num_threads()
        torch.set_num_threads(run.settings.threads or 1)
        try:
            record = make_record(
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
        run.records.append(to_plain(record))
        if not self.config.keep_checkpoints and run.name not in kept:
            run.weights.unlink()
        return record

    def _report(self, unfinished: Sequence[Run], running: int, phase: str) -> None:
        made = _made(self.work, self.done, unfinished)
        facts = f"s of work, {len(self.done)}/{len(self.work)} records ({phase})"
        self.reporter.update(made, ", ".join((facts, *map(_at, unfinished[: min(SHOWN, running)]))))


@contextmanager
def study_runs(config: StudyConfig, workers: int, planned: Iterable[Run]) -> Iterator[StudyRuns]:
    """What trains the runs of a study that consists of the planned ones.

    Progress counts seconds of expected work over all phases of the study; the time left follows from the pace at which
    such work is done.
    """
    planned = list(planned)
    begun_from, again = starts(planned), {run.name for run in untrained(planned)}
    runs = begun_from | {run.name: run for run in planned}
    work = {name: run.work for name, run in runs.items()}
    done = {name for name, run in runs.items() if name not in again and (name in begun_from or run.recorded)}
    first = _made(work, done, [run for name, run in runs.items() if name not in done])
    total = _made(work, set(work), [])
    with stop_signals() as stopped, reporting(f"Study {config.name}", total, first) as reporter:
        yield StudyRuns(config, workers, work, done, stopped, reporter)


def _check_validations(missing: Iterable[Run], records: Mapping[str, RunRecord]) -> None:
    """Losses on other tokens of the validation part do not compare: what is made now must be validated as the rest."""
    here = {validated(run.settings, run.corpus) for run in missing}
    there = {record.contexts for record in records.values()}
    if here and there and here != there:
        raise UserError(
            f"the runs that are there were validated on {' and '.join(sorted(there))}, those that are missing would be "
            f"validated on {' and '.join(sorted(here))}, which does not compare: give another --out."
        )


def _made(work: dict[str, float], done: set[str], unfinished: Iterable[Run]) -> int:
    """Seconds of work behind us; at least one when all of it is, however short the study."""
    parts = sum(run.work * RunDirectory(run.path).last_recorded_step() / run.settings.steps for run in unfinished)
    seconds = sum(work[name] for name in done if name in work) + parts
    return max(1, round(seconds)) if len(done) == len(work) else int(seconds)


def _at(run: Run) -> str:
    """Where a run is, and its last loss."""
    row = RunDirectory(run.path).last_row()
    loss = row.get("loss", row.get("validation_loss"))
    return f"{run.name} {row.get('step', 0)}/{run.settings.steps}" + ("" if loss is None else f" loss {loss:.3f}")


def _began(run: Run) -> dict[str, Any] | None:
    """How the weights that a run began with were trained; None where they were new."""
    plain = RunDirectory(run.path).environment().get("init_config")
    return None if plain is None else canonical(from_plain(TrainConfig, plain, where=str(run.path)))


def _waits(run: Run, unfinished: Container[str]) -> bool:
    """Whether a process of a study that was killed has yet to end here, or the run that this one starts from."""
    if RunDirectory(run.path).busy:
        return True
    return run.start is not None and not run.begun and run.start.name in unfinished


def _command(run: Run, records: Mapping[str, RunRecord]) -> list[str]:
    """What trains a run; the settings are written beside it."""
    start = []
    if run.start is not None and not run.begun:
        if records[run.start.name].validation_loss is None:
            raise UserError(f"{run.start.path} diverged, and no run can start from it: lower lr in the study's start.")
        start = ["--init-from", str(run.start.path)]
    write_json(run.launched, to_plain(run.settings))
    return ["deepdelta", "train", "--config", str(run.launched), "--run", str(run.path), *start]

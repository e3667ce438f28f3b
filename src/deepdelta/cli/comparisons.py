"""The commands that compare: study, task, bench."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg

from deepdelta.cli.shared import to_read
from deepdelta.errors import UserError, listing
from deepdelta.progress import show


@dataclass(frozen=True, kw_only=True)
class Study:
    """Run a comparison: rates tuned, conditions x seeds at matched budgets, statistics, tables and report; or a search,
    or fits over sizes, as its file says. Interrupted, the same command continues."""

    study: Positional[Annotated[str | None, arg(metavar="NAME|FILE.toml")]] = None
    """A named study, or a TOML file of your own; without one, the named studies are listed."""
    out: Path | None = None
    """Where runs, their records, results.json and report.html go; runs/study-NAME by default. A run whose record is
    there is not made again."""
    seeds: tuple[int, ...] | None = None
    """Other seeds than the study's."""
    steps: int | None = None
    """Another number of steps per run than the study's; the warm-up keeps its share."""
    source: str | None = None
    """Another corpus than the study's: a file, a folder or a .bin file."""
    threads: int | None = None
    """Other CPU threads per run than the study's."""
    workers: int | None = None
    """Runs side by side; by default one for each device, or as many as the cores have room for."""
    devices: tuple[str, ...] = ()
    """CUDA devices by name, each for one run at a time; by default all that CUDA_VISIBLE_DEVICES names."""
    on: Literal["here", "ray"] = "here"
    """here, or ray: a Ray cluster whose nodes share the folder --out (extra 'ray')."""
    merge: tuple[Path, ...] = ()
    """Folders of the same study, from other machines say, whose records are taken over; equal ones count once."""
    self_contained: bool = False
    """The report holds the script that draws its pictures (5 MB), instead of plotly.min.js beside it."""
    dry_run: bool = False
    """Say what would run and what that takes, and run nothing."""
    gpu: str | None = None
    """Of a dry run: how many hours it takes on one a100, h100, h200 or b200."""

    def __call__(self) -> None:
        # Here, since it needs the packages of the extra `lab`, which the other commands do without.
        from deepdelta.lab.experiments.config import Search, load_study, study_questions
        from deepdelta.lab.experiments.places import Places
        from deepdelta.lab.runner import run

        if self.study is None:
            print(f"Named studies:\n{listing(study_questions())}")
            return
        if self.gpu is not None and not self.dry_run:
            raise UserError("--gpu belongs to --dry-run; runs are made on the device of the study's settings.")
        if self.dry_run and self.merge:
            raise UserError("--dry-run counts the records of --out alone: leave --merge out.")
        gpu = None
        if self.gpu is not None:
            from deepdelta.planning import gpu_named

            gpu = gpu_named(self.gpu)
        places = Places(workers=self.workers, devices=self.devices, on=self.on)
        common: dict[str, Any] = {} if self.source is None else {"data": {"source": self.source}}
        if self.threads is not None:
            common["threads"] = self.threads
        overrides: dict[str, Any] = {"train": common}
        if self.seeds is not None:
            overrides["seeds"] = list(self.seeds)
        config = load_study(self.study, overrides)
        if self.seeds is not None and isinstance(config, Search):
            raise UserError(f"{config.name} searches on the seeds of its rungs; leave --seeds out.")
        if self.steps is not None:
            config = config.lasting(self.steps)
        command = shlex.join(["deepdelta", *sys.argv[1:]])
        out = self.out or Path("runs") / f"study-{config.name}"
        for warning in dict.fromkeys(config.train_config(name, 0).warning for name in config.conditions):
            if warning is not None:
                show(warning)
        if self.dry_run:
            # What it needs of the planner and of torch takes time to import, and other calls do without.
            from deepdelta.lab.preview import preview
            from deepdelta.lab.views.tables import render

            Console().print(render(preview(config, out, gpu)))
            return
        run(config, out, places=places, merge=self.merge, command=command, self_contained=self.self_contained)
        to_read(out / "report.html", out / "table.md")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Run a task beyond text: every condition once per seed, paired comparisons, a table. Finished runs are kept."""

    name: Positional[Annotated[str | None, arg(metavar="NAME")]] = None
    """A task by its name; without one, the tasks are listed."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    conditions: tuple[str, ...] | None = None
    """These alone, and the baseline; all by default."""
    set: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A setting of all conditions as KEY=VALUE, any number of times: --set group=S3 --set residual.gate_init=0.5."""
    out: Path | None = None
    """Where records, results.json and table.md go; runs/task-NAME by default, what --set and --conditions say added to
    it."""
    workers: int | None = None
    """Runs side by side; one per core by default."""

    def __call__(self) -> None:
        # Here, since it needs the packages of the extra `lab`, which the other commands do without.
        from deepdelta.lab.tasks.registry import SUMMARIES
        from deepdelta.lab.tasks.runner import default_folder, run_task
        from deepdelta.lab.tasks.task import read_overrides

        if self.name is None:
            print(f"Tasks:\n{listing(SUMMARIES)}")
            return
        out = self.out or default_folder(self.name, (*self.set, *(self.conditions or ())))
        command = shlex.join(["deepdelta", *sys.argv[1:]])
        overrides = read_overrides(self.set)
        run_task(
            self.name,
            self.seeds,
            out,
            overrides=overrides,
            conditions=self.conditions,
            workers=self.workers,
            command=command,
        )
        to_read(out / "table.md")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time a named suite: correctness first, then interleaved rounds; JSON, table and plot."""

    name: Positional[Annotated[str | None, arg(metavar="NAME")]] = None
    """bar, peers, growth, operator, networks, gpu, gradients or depth; without one, the suites are listed."""
    out: Path | None = None
    """Where results.json, table.md, plot.svg and plot.html go; runs/bench-NAME by default."""
    rounds: int | None = None
    """Another number of interleaved rounds than the suite's."""
    threads: int | None = None
    """CPU threads; all cores by default."""
    quick: bool = False
    """Small sizes, five rounds, nothing compiled, on the CPU where there is no GPU: to see that all of it runs. No
    measurement."""
    redraw: Path | None = None
    """A folder whose table and plots are made anew from its results.json; nothing is timed."""

    def __call__(self) -> None:
        # Here: importing what compares takes time that the other commands need not spend.
        from deepdelta.lab.bench import (
            DEPTH,
            GRADIENTS,
            QUESTIONS,
            load_suite,
            redraw,
            run_depth,
            run_gradients,
            run_suite,
        )
        from deepdelta.lab.bench.config import quick

        if self.redraw is not None:
            redraw(self.redraw)
            to_read(self.redraw / "plot.html")
            return
        if self.name is None:
            print(f"Suites:\n{listing(QUESTIONS)}")
            return
        out = self.out or Path("runs") / f"bench-{self.name}"
        command = shlex.join(["deepdelta", *sys.argv[1:]])
        if self.name == DEPTH:
            if self.rounds is not None or self.threads is not None:
                raise UserError(f"{DEPTH} measures no times, so it has no rounds and one thread; leave both out.")
            run_depth(out, quick=self.quick, command=command)
            to_read(out / "table.md")
            return
        if self.name == GRADIENTS:
            if self.rounds is not None:
                raise UserError(f"{GRADIENTS} measures no times, so it has no rounds; leave --rounds out.")
            run_gradients(out, threads=self.threads, quick=self.quick, command=command)
            to_read(out / "table.md")
            return
        suite = load_suite(self.name)
        run_suite(
            quick(suite) if self.quick else suite,
            out,
            rounds=self.rounds,
            threads=self.threads,
            quick=self.quick,
            command=command,
        )
        to_read(out / "plot.html", out / "table.md")

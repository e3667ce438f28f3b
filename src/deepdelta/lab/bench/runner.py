"""Run a suite: check everything, then time group after group, then write what was found."""

import gc
import importlib.metadata
import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from deepdelta.device import Device, choose_device, keep_freed_memory, usable_cores
from deepdelta.errors import UserError, require
from deepdelta.files import AnyPath, locked, write_text
from deepdelta.lab.bench import figures, tables
from deepdelta.lab.bench.checks import check, check_compiled
from deepdelta.lab.bench.config import ADDED, MEASURES, Case, Group, Suite
from deepdelta.lab.bench.results import BenchResults, GroupResult, Row, bars_of, load_results, timing_of
from deepdelta.lab.bench.subjects import Subject, added, build, code_of, problem
from deepdelta.lab.measure.cost import WARM_UP, interleaved
from deepdelta.lab.views.page import write_page
from deepdelta.lab.views.tables import render
from deepdelta.limits import check_threads
from deepdelta.progress import Reporter, reporting, show
from deepdelta.provenance import now, provenance, versions

COMPILATIONS = 4
"""Compilations that a model may need (training, without gradients, and room)."""

PACKAGES = ("numba", "triton", "hyper-connections", "x-transformers")
"""What figures depend on beside what every figure of the library does."""


PICTURES = ("matplotlib", "jinja2")
"""What draws plot.svg and plot.html."""
LATER = "`deepdelta bench --redraw FOLDER` makes them of results.json, where these are."


def run_suite(
    suite: Suite,
    out: AnyPath,
    *,
    rounds: int | None = None,
    threads: int | None = None,
    quick: bool = False,
    command: str,
) -> BenchResults:
    """Time a suite and write results.json, table.md, plot.svg and plot.html to `out`, with the page of the operator to
    which that links; the table is printed too.

    Without the packages of PICTURES the plots are left out, and that is said.

    Args:
        rounds: interleaved rounds per group; None: the suite's.
        threads: CPU threads; None: all cores that this process may use.
        quick: whether `suite` was cut down by `config.quick`; kept with the results.
        command: the command that was typed, kept with the results.

    Raises:
        UserError: rounds or threads below 1, the suite's device is absent, another process is at
            work in `out`, nothing in a group can run, or a check failed; then nothing more is timed or written.
    """
    if rounds is not None and rounds < 1:
        raise UserError(f"rounds must be at least 1, got {rounds}.")
    check_threads(threads)
    rounds, threads = rounds or suite.rounds, threads or usable_cores()
    chosen = choose_device(suite.device, suite.precision)
    console, began, out = Console(), now(), Path(out)
    if missing := _undrawable():
        show(f"No plot.svg and plot.html: {' and '.join(missing)} are absent (extra 'lab'). {LATER}")
    skipped = {group.name: _skipped(group, suite) for group in suite.groups}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_freed_memory()
    # All models of a kind share one forward function, and torch counts compilations by function.
    limit = max(len(group.cases) for group in suite.groups) * COMPILATIONS
    groups: list[GroupResult] = []

    def so_far() -> BenchResults:
        return BenchResults(
            suite=suite.name,
            question=suite.question,
            quick=quick,
            **provenance(command, all_versions()),
            date=began,
            device=suite.device,
            precision=suite.precision,
            threads=threads,
            rounds=rounds,
            checks=tuple(checks),
            groups=tuple(groups),
        )

    try:
        with locked(out), torch._dynamo.config.patch(recompile_limit=limit):
            checks = _check(suite, skipped, chosen)
            total = sum(_units(group, rounds) for group in suite.groups)
            with reporting(f"Bench {suite.name}", total) as reporter:
                done = 0
                for group in suite.groups:
                    torch.set_num_threads(group.threads or threads)
                    result, found = _measure(group, skipped[group.name], rounds, _for(group, chosen), reporter, done)
                    groups.append(result)
                    checks += found
                    done += _units(group, rounds)
                    # After every group: what a long benchmark has measured is not lost when it is interrupted.
                    _write(so_far(), out)
                    gc.collect()
    finally:
        torch.set_num_threads(threads_before)
    results = so_far()
    for table in map(render, tables.bench_tables(results)):
        console.print(table)
    show(f"Results, table and plot: {out}")
    return results


def redraw(out: AnyPath) -> None:
    """Write table and plots anew from the results.json in a folder.

    Raises:
        UserError: there are no such results, or the extra `lab` is absent.
    """
    require("plots", "lab", *PICTURES)
    _write(load_results(Path(out) / "results.json"), Path(out))


def _write(results: BenchResults, out: Path) -> None:
    results.save(out / "results.json")
    write_text(out / "table.md", tables.markdown(results))
    if not _undrawable():
        picture = figures.svg(results)
        write_text(out / "plot.svg", picture)
        write_page(out / "plot.html", figures.page(results, picture), "")


def _undrawable() -> list[str]:
    """The packages that are absent for plots."""
    return [name for name in PICTURES if importlib.util.find_spec(name) is None]


def _skipped(group: Group, suite: Suite) -> dict[str, str]:
    found = {case.name: reason for case in group.cases if (reason := problem(group, case, suite))}
    if group.baseline in found and not group.compiled:
        raise UserError(f"{group.name}: the baseline cannot run here: {found[group.baseline]}.")
    return found


def _check(suite: Suite, skipped: dict[str, dict[str, str]], chosen: Device) -> list[str]:
    """Everything that can be checked before anything is compiled."""
    found: list[str] = []
    with reporting("Checking", len(suite.groups)) as reporter:
        for done, group in enumerate(suite.groups, 1):
            found += check(group, _able(group, skipped[group.name]), _for(group, chosen))
            reporter.update(done, group.name)
    return found


def _for(group: Group, chosen: Device) -> Device:
    """The device with the group's own precision."""
    return replace(chosen, precision=group.precision or chosen.precision)


def _preparation(group: Group) -> int:
    """About as many rounds as the preparation of a case takes: warming up and measuring memory, or compiling."""
    return 20 if group.compiled else WARM_UP + 2


def _units(group: Group, rounds: int) -> int:
    """The length of a group's measurement, in runs of a case."""
    return len(group.cases) * (_preparation(group) + (rounds if MEASURES[group.work] else 0))


def _able(group: Group, skipped: dict[str, str]) -> tuple[Case, ...]:
    return tuple(case for case in group.cases if case.name not in skipped)


def _measure(
    group: Group, skipped: dict[str, str], rounds: int, chosen: Device, reporter: Reporter, done: int
) -> tuple[GroupResult, list[str]]:
    cases = _able(group, skipped)
    if group.baseline in skipped or not cases:
        return GroupResult(group=group, rows=(), skipped=skipped, bars=()), []
    # Every model of a group is compiled for the group's shapes alone, as it would be in training.
    torch.compiler.reset()
    subjects: dict[str, Subject] = {}
    peaks: dict[str, int] = {}
    checks = []
    if group.work in ADDED:
        subjects[ADDED[group.work]] = added(group, chosen)
        _warm_up(subjects[ADDED[group.work]])
    for number, case in enumerate(cases):
        reporter.update(
            done + number * _preparation(group),
            f"{group.name}: {'compiling' if group.compiled else 'preparing'} {case.name}",
        )
        subject = build(group, case, chosen)
        if subject.verify is not None:
            checks.append(check_compiled(group, case, subject, chosen))
        _warm_up(subject)
        if subject.peak is not None:
            peaks[case.name] = subject.peak()
        # What is measured for memory alone makes room for the next.
        subjects[case.name] = subject if MEASURES[group.work] else Subject(
            stages=(), tokens=subject.tokens, parameters=subject.parameters, moved=subject.moved
        )  # fmt: skip
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in subjects}
    prepared = done + len(group.cases) * _preparation(group)
    if MEASURES[group.work]:
        times = interleaved(
            {name: subject.stages for name, subject in subjects.items()},
            rounds=rounds,
            device=chosen.device,
            progress=lambda made, _: reporter.update(prepared + made * len(group.cases), group.name),
        )
    codes = {case.name: code_of(case, chosen.device.type) for case in group.cases} | dict.fromkeys(
        ADDED.values(), "PyTorch"
    )
    rows = tuple(_row(group, name, codes[name], subjects, times, peaks) for name in subjects)
    return GroupResult(group=group, rows=rows, skipped=skipped, bars=bars_of(group, rows)), checks


def _row(
    group: Group,
    name: str,
    code: str,
    subjects: dict[str, Subject],
    times: dict[str, list[tuple[float, ...]]],
    peaks: dict[str, int],
) -> Row:
    subject = subjects[name]
    timings = {}
    for number, measure in enumerate(MEASURES[group.work]):
        seconds, baseline = ([ends[number] for ends in times[one]] for one in (name, group.baseline))
        counted = {
            key: values[number] for key in ("bytes_per_token", "flops_per_token") if (values := getattr(subject, key))
        }
        timings[measure] = timing_of(seconds, baseline, subject.tokens, **counted)
    return Row(
        case=name,
        code=code,
        parameters=subject.parameters,
        timings=timings,
        peak_bytes=peaks.get(name),
        peak_ratio=peaks[name] / peaks[group.baseline] if name in peaks else None,
        moved=subject.moved,
    )


def _warm_up(subject: Subject) -> None:
    for _ in range(WARM_UP):
        for stage in subject.stages:
            stage()


def all_versions() -> dict[str, str]:
    """Of what figures depend on, where it is installed."""
    found = versions()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""How far gradients are from fp64 in a deep model, by backend and by what is saved for the backward pass.

No timing: what each figure says is an error, relative to the fp64 reference with the same weights, in the 2-norm.
"""

import copy
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import torch
from rich.console import Console
from torch import Tensor

from deepdelta.device import choose_device, usable_cores
from deepdelta.errors import UserError
from deepdelta.files import AnyPath, locked, write_text
from deepdelta.lab.analysis.stored import Stored
from deepdelta.lab.bench.checks import disturb
from deepdelta.lab.bench.runner import all_versions
from deepdelta.lab.bench.suites import GRADIENTS, QUESTION
from deepdelta.lab.measure.agreement import agreement, gradients_of, relative
from deepdelta.lab.views.tables import Column, TextTable, markdown_page, render
from deepdelta.limits import check_threads
from deepdelta.models import GPT, GPTConfig
from deepdelta.nn import Plan, ResidualConfig, use_backend, use_memory
from deepdelta.nn.presets import PRESETS
from deepdelta.ops.step import fused_problem
from deepdelta.progress import reporting, show
from deepdelta.provenance import now, provenance

ALL, PLAIN, WORST = "all gradients", "of PyTorch's own", "worst parameter"
COLUMNS = (
    *(Column(title, words=True) for title in ("case", "precision", "plan")),
    Column(ALL),
    Column(f"{ALL} least-most", narrow=False),
    Column(PLAIN),
    Column(WORST, narrow=False),
    Column(f"{WORST} least-most", narrow=False),
    Column("bits of save", narrow=False),
)

CASES: Mapping[str, ResidualConfig] = MappingProxyType(
    {
        **{name: PRESETS[name] for name in ("additive", "ddl", "paper-scalar", "paper-cc")},
        "paper-cc, gates at 0.25": replace(PRESETS["paper-cc"], gate_init=0.25),
    }
)

Start = Literal["initial", "moved"]
Precision = Literal["fp32", "bf16", "bf16 weights"]
Code = Literal["reference", "fused"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is measured: a model of these sizes, one sequence, each combination of the other fields, each seed."""

    cases: tuple[str, ...] = tuple(CASES)
    layers: int = 48
    dim: int = 64
    heads: int = 4
    tokens: int = 64
    vocab_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    starts: tuple[Start, ...] = get_args(Start)
    """initial: as training starts. moved: every parameter off its start, targets and gates included."""
    precisions: tuple[Precision, ...] = get_args(Precision)
    """bf16 is autocast, as in training; bf16 weights: the parameters, hence state and gradients, too."""
    backends: tuple[Code, ...] = get_args(Code)
    plans: tuple[Plan, ...] = get_args(Plan)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The errors of one combination, by seed."""

    case: str
    start: Start
    precision: Precision
    backend: Code
    plan: Plan
    whole: tuple[float, ...]
    """|g - g64| / |g64|, all gradients as one vector."""
    largest: tuple[float, ...]
    """The largest such error of a parameter (`agreement`)."""
    as_saved: bool
    """Whether every gradient of every seed is bit for bit that of the plan `save`."""


@dataclass(frozen=True, kw_only=True)
class GradientResults(Stored):
    """`results.json` is exactly this."""

    suite: str = GRADIENTS
    question: str = QUESTION
    quick: bool
    """Run at reduced sizes: says nothing of a deep model."""
    date: str
    """UTC, ISO 8601, of the beginning."""
    threads: int
    trial: Trial
    rows: tuple[Row, ...]


DEEP = Trial()
SMALL = Trial(layers=4, dim=16, heads=2, tokens=16, seeds=(0,))


def run_gradients(
    out: AnyPath, *, threads: int | None = None, quick: bool = False, command: str, trial: Trial | None = None
) -> GradientResults:
    """Measure, and write results.json and table.md to `out`; the tables are printed too.

    Args:
        threads: CPU threads; None: all cores that this process may use.
        quick: measure SMALL instead of DEEP.
        command: the command that was typed, kept with the results.
        trial: another one than these.

    Raises:
        UserError: threads outside of 1 to 1,024, or the fused step cannot run here.
    """
    check_threads(threads)
    if problem := fused_problem(torch.device("cpu"), torch.float32):
        raise UserError(f"{problem}; it is what `deepdelta bench {GRADIENTS}` measures.")
    trial = trial or (SMALL if quick else DEEP)
    began, before = now(), torch.get_num_threads()
    out = Path(out)
    with locked(out):
        torch.set_num_threads(threads or usable_cores())
        try:
            rows = tuple(measured(trial))
            results = GradientResults(
                quick=quick,
                **provenance(command, all_versions()),
                date=began,
                threads=torch.get_num_threads(),
                trial=trial,
                rows=rows,
            )
        finally:
            torch.set_num_threads(before)
        results.save(out / "results.json")
        write_text(out / "table.md", markdown(results))
    for one in cells(results):
        Console().print(render(one))
    show(f"Results and table: {out}")
    return results


def measured(trial: Trial) -> Iterator[Row]:
    combinations = list(product(trial.cases, trial.starts, trial.precisions))
    with reporting(f"Bench {GRADIENTS}", len(combinations) * len(trial.seeds)) as reporter:
        done = 0
        for case, start, precision in combinations:
            found: dict[tuple[Code, Plan], list[tuple[float, float, bool]]] = {}
            for seed in trial.seeds:
                for ways, one in _errors(trial, case, start, precision, seed):
                    found.setdefault(ways, []).append(one)
                done += 1
                reporter.update(done, f"{case}, {start}, {precision}")
            for (backend, plan), by_seed in found.items():
                whole, largest, same = zip(*by_seed, strict=True)
                yield Row(
                    case=case,
                    start=start,
                    precision=precision,
                    backend=backend,
                    plan=plan,
                    whole=whole,
                    largest=largest,
                    as_saved=all(same),
                )


def _errors(
    trial: Trial, case: str, start: Start, precision: Precision, seed: int
) -> Iterator[tuple[tuple[Code, Plan], tuple[float, float, bool]]]:
    """Of every backend and plan: the two errors, and whether the gradients are those of `save`."""
    sizes = {name: getattr(trial, name) for name in ("vocab_size", "layers", "heads", "dim")}
    model = GPT(GPTConfig(**sizes, context=trial.tokens, embedding_std=0.02, residual=CASES[case]), seed)
    if start == "moved":
        disturb(model, seed)
    if precision == "bf16 weights":
        model.bfloat16()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(trial.vocab_size, (1, trial.tokens + 1), generator=generator)
    exact = copy.deepcopy(model).double()
    plain = choose_device("cpu", "fp32")
    truth = gradients_of(exact, ids, plain)
    for backend in trial.backends:
        use_backend(model, backend)
        saved: dict[str, Tensor] = {}
        for plan in trial.plans:
            use_memory(model, plan)
            found = gradients_of(model, ids, replace(plain, precision="bf16") if precision == "bf16" else plain)
            saved = saved or found
            whole, largest = relative(found, truth), agreement(found, truth)
            if not math.isfinite(largest):
                raise UserError(
                    f"gradients must be finite to be compared, got others for {case}, {start}, {precision}, {backend}, "
                    f"{plan}; please report it."
                )
            same = all(torch.equal(found[name], saved[name]) for name in found)
            yield (backend, plan), (whole, largest, same)


def facts(results: GradientResults) -> str:
    """What the figures depend on, in a sentence."""
    trial = results.trial
    return (
        f"{'QUICK RUN at reduced sizes. ' if results.quick else ''}d {trial.dim}, {trial.layers} layers, one sequence "
        f"of {trial.tokens} tokens, vocabulary {trial.vocab_size}, seeds {', '.join(map(str, trial.seeds))}; "
        + results.facts(f"{results.threads} threads", results.date)
    )


def markdown(results: GradientResults) -> str:
    return markdown_page(f"{results.suite}: {results.question}", (facts(results),), cells(results))


def cells(results: GradientResults) -> list[TextTable]:
    """A table per start: the error of all gradients as one vector, and that of the worst parameter."""
    titles = {"initial": "As training starts", "moved": "Every parameter moved off its start"}
    plain = {(r.case, r.start, r.precision): r for r in results.rows if (r.backend, r.plan) == ("reference", "save")}
    return [
        TextTable(
            title=titles[start],
            columns=COLUMNS,
            rows=tuple(
                (
                    f"{row.case}, {row.backend}",
                    row.precision,
                    row.plan,
                    *_median_and_range(row.whole),
                    _times(row, plain[row.case, row.start, row.precision]),
                    *_median_and_range(row.largest),
                    "yes" if row.as_saved else "no",
                )
                for row in results.rows
                if row.start == start
            ),
            notes=(
                "Relative to the fp64 reference with the same weights: median over seeds.",
                f"'{PLAIN}': as a multiple of the error of the reference with plan save.",
            ),
        )
        for start in results.trial.starts
    ]


def _times(row: Row, plain: Row) -> str:
    ratios = [ours / theirs for ours, theirs in zip(row.whole, plain.whole, strict=True)]
    return f"{statistics.median(ratios):.2f}"


def _median_and_range(errors: tuple[float, ...]) -> tuple[str, str]:
    return f"{statistics.median(errors):.1e}", f"{min(errors):.1e}-{max(errors):.1e}"

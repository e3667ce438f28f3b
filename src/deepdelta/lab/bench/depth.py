"""Norms of the state and of its gradient after every sublayer of very deep stacks, as training starts; in fp64."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from deepdelta.files import AnyPath, locked, write_text
from deepdelta.lab.analysis.stored import Stored
from deepdelta.lab.bench.runner import all_versions
from deepdelta.lab.bench.suites import DEPTH, DEPTH_QUESTION
from deepdelta.lab.views.svg import drawn, label, svg
from deepdelta.lab.views.tables import Column, TextTable, markdown_page, render
from deepdelta.models.rivals import PACKAGES, STREAMS, streamed
from deepdelta.nn.stream import DeltaStream
from deepdelta.progress import reporting, show
from deepdelta.provenance import now, provenance

DELTA: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "plain residual": {"rule": "additive"},
        "default, V = 1": {"value_channels": 1},
        "default, V = 4": {"value_channels": 4},
        "delta rule, V = 1": {"rule": "delta", "value_channels": 1},
        "delta rule, V = 4": {"rule": "delta", "value_channels": 4},
    }
)
MHC = "mHC, 4 streams"
SHOWN = (1, 10, 30, 96, 200, 400, 1000)
"""Depths of the table."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What is measured: so many sublayers of MLP branches at this width, on a batch of vectors drawn once."""

    sublayers: int = 1000
    dim: int = 32
    rows: int = 2
    tokens: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One residual: after sublayer 0 (the expansion), 1, 2, ..."""

    kind: str
    state: tuple[float, ...]
    """The root mean square of the state."""
    gradient: tuple[float, ...]
    """|dL / dX|, added up over value channels or streams: how L changes where all of them move alike."""


@dataclass(frozen=True, kw_only=True)
class DepthResults(Stored):
    """`results.json` is exactly this."""

    suite: str = DEPTH
    question: str = DEPTH_QUESTION
    quick: bool
    date: str
    """UTC, ISO 8601, of the beginning."""
    stack: Stack
    curves: tuple[Curve, ...]


def run_depth(out: AnyPath, *, quick: bool = False, command: str) -> DepthResults:
    """Measure, and write results.json, table.md and plot.svg to `out`.

    Args:
        quick: a stack of 20 sublayers instead of 1,000.
        command: the command that was typed, kept with the results.

    Raises:
        UserError: the extra `lab` is not installed.
    """
    out, began, stack = Path(out), now(), Stack(sublayers=20) if quick else Stack()
    with locked(out):
        curves = tuple(measured(stack))
        results = DepthResults(
            quick=quick, **provenance(command, all_versions()), date=began, stack=stack, curves=curves
        )
        results.save(out / "results.json")
        write_text(out / "table.md", markdown(results))
        write_text(out / "plot.svg", picture(results))
    for table in tables(results):
        Console().print(render(table))
    show(f"Results, table and picture: {out}")
    return results


def measured(stack: Stack) -> Iterator[Curve]:
    kinds = [*DELTA, MHC]
    with reporting(f"Bench {DEPTH}", len(kinds)) as reporter:
        for done, kind in enumerate(kinds, start=1):
            yield Curve(kind=kind, **_norms(stack, kind))
            reporter.update(done, kind)


def _norms(stack: Stack, kind: str) -> dict[str, tuple[float, ...]]:
    """L is the product of the normed output with a vector that is drawn once, the same for every kind."""
    torch.manual_seed(stack.seed)
    dim = stack.dim
    expand, sublayers, reduce = (_rival if kind == MHC else _delta)(stack, kind)
    torch.manual_seed(stack.seed + 1)
    x = torch.randn(stack.rows, stack.tokens, dim, dtype=torch.float64)
    states = [expand(x).detach().requires_grad_()]
    for sublayer in sublayers:
        states.append(sublayer(states[-1]))
        states[-1].retain_grad()
    out = nn.functional.rms_norm(reduce(states[-1]), (dim,))
    (out * torch.randn_like(out)).sum().backward()  # type: ignore[no-untyped-call]
    return {
        "state": tuple(_short(state.detach().square().mean().sqrt()) for state in states),
        "gradient": tuple(_short(_of_all_streams(state, stack, kind).norm()) for state in states),
    }


def _short(number: Tensor) -> float:
    """Six digits, which is more than one draw says."""
    return float(f"{number.item():.6g}")


def _of_all_streams(state: Tensor, stack: Stack, kind: str) -> Tensor:
    assert state.grad is not None
    rows = stack.rows, STREAMS, stack.tokens, stack.dim
    return state.grad.view(rows).sum(1) if kind == MHC else state.grad.sum(-2)


Parts = tuple[Callable[[Tensor], Tensor], list[nn.Module], Callable[[Tensor], Tensor]]


def _branches(stack: Stack) -> list[nn.Module]:
    dim = stack.dim
    return [nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(stack.sublayers)]


def _delta(stack: Stack, kind: str) -> Parts:
    branches, stream = _branches(stack), DeltaStream(stack.dim, seed=stack.seed, **DELTA[kind]).double()
    return stream.expand, [stream.wrap(branch).double() for branch in branches], stream.reduce


def _rival(stack: Stack, kind: str) -> Parts:
    normed = (nn.Sequential(nn.RMSNorm(stack.dim, eps=1e-5), branch) for branch in _branches(stack))
    expand, sublayers, reduce = streamed(PACKAGES["mhc"], normed, stack.dim)
    return expand, [sublayer.double() for sublayer in sublayers], reduce


def tables(results: DepthResults) -> list[TextTable]:
    """The state's size and the gradient's norm at some depths."""
    total = results.stack.sublayers
    depths = [depth for depth in SHOWN if depth <= total]
    columns = (Column("residual", words=True), *(Column(f"{depth:,}") for depth in depths))
    state = [(one.kind, *(f"{one.state[depth]:.3g}" for depth in depths)) for one in results.curves]
    gradient = [(one.kind, *(f"{one.gradient[total - depth]:.3g}" for depth in depths)) for one in results.curves]
    last = f"Of dL/dX, added up over value channels or streams; before {total:,} it is the gradient at the input."
    return [
        TextTable(title="Root mean square of the state after so many sublayers", columns=columns, rows=tuple(state)),
        TextTable(
            title="Norm of the gradient before so many last sublayers",
            columns=columns,
            rows=tuple(gradient),
            notes=(last,),
        ),
    ]


def facts(results: DepthResults) -> str:
    """What the figures depend on, in a sentence."""
    stack = results.stack
    return (
        f"{'QUICK RUN at reduced depth. ' if results.quick else ''}{stack.sublayers:,} sublayers of MLP branches at d "
        f"{stack.dim}, {stack.rows} x {stack.tokens} vectors, fp64, as training starts, seed {stack.seed}; "
        + results.facts("1 threads", results.date)
    )


def markdown(results: DepthResults) -> str:
    return markdown_page(f"{results.suite}: {results.question}", (facts(results),), tables(results))


def picture(results: DepthResults) -> str:
    """The picture as text: state and gradient against depth, both on logarithmic scales.

    Raises:
        UserError: matplotlib is not installed.
    """

    def draw(part: Any) -> None:
        left, right = part.subplots(1, 2)
        for axes, title, name in ((left, "state, root mean square", "state"), (right, "|dL/dX|", "gradient")):
            for number, one in enumerate(results.curves):
                style = "--" if one.kind.startswith("default") else "-"
                axes.plot(getattr(one, name), style, color=f"C{number}", linewidth=1.2, label=label(one.kind))
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("sublayers")
        left.legend(fontsize=8)

    stack = results.stack
    how = f"{stack.sublayers:,} sublayers of MLP branches, d {stack.dim}, fp64, as training starts; one draw"
    return svg(drawn(results.question, how, (3.6,), draw))

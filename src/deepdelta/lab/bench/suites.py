"""The named suites."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from deepdelta.errors import unknown
from deepdelta.lab.bench.config import Bar, Case, Group, Suite
from deepdelta.lab.bench.networks import NetworkName
from deepdelta.models import Rival
from deepdelta.nn import Backend, ResidualConfig
from deepdelta.nn.presets import PRESETS

ADDITIVE = Case(name="additive", residual=PRESETS["additive"])
ADDITIVE_FUSED = Case(name="additive, fused", residual=PRESETS["additive"], backend="fused")
SCALAR = (
    Case(name="paper-scalar", residual=PRESETS["paper-scalar"]),
    Case(name="paper-scalar, fused", residual=PRESETS["paper-scalar"], backend="fused"),
)
DDL = (
    Case(name="paper-cc", residual=PRESETS["paper-cc"]),
    Case(name="paper-cc, fused", residual=PRESETS["paper-cc"], backend="fused"),
)
DEFAULT_1 = replace(PRESETS["plain-start"], value_channels=1)
DEFAULT = (
    Case(name="default V=1", residual=DEFAULT_1),
    Case(name="default V=1, fused", residual=DEFAULT_1, backend="fused"),
    Case(name="default, fused", residual=PRESETS["plain-start"], backend="fused"),
)
"""What `DeltaStream` is without a choice, V = 1 and 4."""
DDL_16 = Case(name="paper-cc V=16, fused", residual=replace(PRESETS["paper-cc"], value_channels=16), backend="fused")
CONTROLS = (
    Case(name="write_only, fused", residual=replace(PRESETS["paper-cc"], rule="write_only"), backend="fused"),
    Case(name="additive_erase, fused", residual=replace(PRESETS["paper-cc"], rule="additive_erase"), backend="fused"),
)
HYPER, MHC, *OTHERS = RIVALS = tuple(Case(name=rival, rival=rival) for rival in get_args(Rival))

OURS = (ADDITIVE, ADDITIVE_FUSED, *SCALAR, *DDL, *DEFAULT)


def reaches(scalar: float, wide: float, measure: str = "forward_backward", fused: str = ", fused") -> tuple[Bar, ...]:
    """What V = 1 and V = 4 must reach of the additive model's throughput, the default and the paper's form, with the
    code that `auto` takes; `fused` ends the name of a case at V = 1."""
    cases = {
        f"default V=1{fused}": scalar,
        f"paper-scalar{fused}": scalar,
        "default, fused": wide,
        "paper-cc, fused": wide,
    }
    return tuple(Bar(case=case, against="additive", measure=measure, at_least=bar) for case, bar in cases.items())


FASTER = Bar(case="paper-cc, fused", against=HYPER.name, at_least=1.0)
LESS_MEMORY = Bar(case="paper-cc, fused", against=HYPER.name, measure="peak", at_most=1.0)

BAR = Suite(
    name="bar",
    question="What does a delta residual cost against the additive model, and against other residuals?",
    groups=(
        Group(
            name="training, d 256, eager",
            work="training",
            dim=256,
            layers=4,
            cases=(*OURS, HYPER, MHC),
            baseline="additive",
            bars=(*reaches(0.97, 0.90), FASTER, LESS_MEMORY),
        ),
        *(
            Group(
                name=f"memory, {layers} layers",
                work="memory",
                dim=256,
                layers=layers,
                batch=batch,
                cases=(*OURS, HYPER),
                baseline="additive",
                bars=(Bar(case="paper-cc, fused", against="additive", measure="peak", at_most=1.02), LESS_MEMORY),
            )
            for layers, batch in ((24, 8), (96, 2))
        ),
        *(
            Group(
                name=f"decoding, d 256, batch {batch}",
                work="decoding",
                dim=256,
                layers=4,
                batch=batch,
                cases=OURS,
                baseline="additive",
                bars=reaches(1.0, 1.0, measure="decoding"),
            )
            for batch in (1, 8)
        ),
        Group(
            name="prefill, d 256, eager",
            work="prefill",
            dim=256,
            layers=4,
            cases=(*OURS, HYPER, MHC),
            baseline="additive",
            bars=reaches(1.0, 1.0, measure="forward"),
        ),
        Group(
            name="training, d 256, compiled",
            work="training",
            dim=256,
            layers=4,
            compiled=True,
            cases=(*OURS, DDL_16, HYPER),
            baseline="additive",
            bars=(
                *reaches(0.985, 0.94, fused=""),
                Bar(case="paper-cc V=16, fused", against="paper-cc, fused", at_least=0.88),
                FASTER,
            ),
        ),
        Group(
            name="training, d 768, compiled",
            work="training",
            dim=768,
            layers=2,
            heads=12,
            batch=4,
            compiled=True,
            cases=(*OURS, HYPER),
            baseline="additive",
            bars=reaches(0.99, 0.97, fused=""),
        ),
    ),
)

PEERS = Suite(
    name="peers",
    question="What do other residuals cost, and what does each rule?",
    groups=tuple(
        Group(
            name=f"training, d 256, {'compiled' if compiled else 'eager'}",
            work="training",
            dim=256,
            layers=4,
            compiled=compiled,
            cases=(*OURS, DDL_16, *CONTROLS, *RIVALS),
            baseline="additive",
        )
        for compiled in (False, True)
    ),
)

CURVE = (ADDITIVE, DDL[1])


def channels(count: int) -> tuple[Case, ...]:
    residual = PRESETS["paper-scalar"] if count == 1 else replace(PRESETS["paper-cc"], value_channels=count)
    return (ADDITIVE, replace(DDL[1], residual=residual))


POINT = Group(name="point", work="training", dim=256, layers=4, cases=CURVE, baseline="additive")


def point(axis: str, value: int, **changes: Any) -> Group:
    """A point of a growth curve; what does not change is that of POINT."""
    return replace(POINT, name=f"{axis} {value}", axis=axis, value=value, **changes)


GROWTH = Suite(
    name="growth",
    question="How do time and memory of a training step grow with V, width, depth, sequence, batch and threads?",
    rounds=9,
    groups=(
        *(point("V", count, cases=channels(count)) for count in (1, 2, 4, 8, 16)),
        *(point("d", dim, dim=dim, heads=dim // 64, batch=4) for dim in (128, 256, 512, 768)),
        *(point("layers", layers, layers=layers, dim=128, heads=2, batch=2) for layers in (2, 6, 24, 96)),
        *(point("tokens", tokens, context=tokens, batch=4096 // tokens) for tokens in (128, 512, 1024, 4096)),
        *(point("batch", batch, batch=batch) for batch in (1, 4, 16)),
        *(point("threads", threads, threads=threads) for threads in (1, 2)),
    ),
)


def operator(dim: int, residual: ResidualConfig) -> Group:
    return Group(
        name=f"rewrite, d {dim}, V={residual.value_channels}",
        work="operator",
        dim=dim,
        batch=8192 * 256 // dim,
        context=1,
        baseline="triad",
        cases=(
            Case(name="reference", residual=residual),
            Case(name="fused", residual=residual, backend="fused"),
        ),
    )


OPERATOR = Suite(
    name="operator",
    question="How near does the rewrite with the next opening come to what its bytes allow?",
    groups=tuple(
        operator(dim, replace(PRESETS["paper-cc-repeat"], value_channels=count))
        for dim in (256, 768)
        for count in (1, 4, 16)
    ),
)

AUTO: tuple[Backend, ...] = ("auto", "reference")
SMALL_NETWORKS: dict[NetworkName, int] = {"mlp": 64, "cnn": 16, "encoder": 32}
"""With their widths."""

NETWORKS = Suite(
    name="networks",
    question="What does a step of a small network cost with the default, where calls cost more than work?",
    rounds=60,
    groups=tuple(
        Group(
            name=name,
            work="network",
            network=name,
            dim=dim,
            layers=4,
            batch=64,
            context=1,
            baseline="plain",
            cases=tuple(
                Case(name=f"default V={count}, {backend}", residual=residual, backend=backend)
                for count, residual in ((1, DEFAULT_1), (4, PRESETS["plain-start"]))
                for backend in (("auto", "reference"))
            ),
            bars=(
                *(
                    Bar(case=f"default V={count}, auto", against="plain", measure="step", at_least=least)
                    for count, least in ((1, 0.77), (4, 0.625))
                ),
                *(
                    Bar(case=f"default V={count}, auto", against=f"default V={count}, reference", at_least=1.0)
                    for count in (1, 4)
                ),
            ),
        )
        for name, dim in SMALL_NETWORKS.items()
    ),
)
"""A step of 1.3 and 1.6 times the plain one's time has 0.77 and 0.625 of its speed."""

PRECISIONS: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
SMALL: dict[str, Any] = {"dim": 768, "layers": 12, "heads": 6, "vocab_size": 50304, "baseline": "additive"}
"""The published small size (124M)."""

GPU = Suite(
    name="gpu",
    question="How fast is the fused step on a GPU, and what does a delta residual cost at the published small size?",
    device="cuda",
    precision="bf16",
    groups=(
        *(
            replace(
                operator(dim, replace(PRESETS["paper-cc-repeat"], value_channels=count)),
                name=f"rewrite, d {dim}, V={count}, {precision}",
                batch=2**25 // dim,
                precision=precision,
            )
            for precision in PRECISIONS
            for dim in (768, 2048, 4096)
            for count in (1, 4, 16)
        ),
        Group(
            name="training, 124M, compiled",
            work="training",
            batch=16,
            context=1024,
            compiled=True,
            cases=(ADDITIVE, SCALAR[1], *DDL, *DEFAULT, HYPER, MHC),
            bars=(
                *reaches(0.98, 0.92),
                Bar(case="paper-cc, fused", against="additive", measure="peak", at_most=1.03),
            ),
            **SMALL,
        ),
        Group(
            name="memory, 124M",
            work="memory",
            batch=4,
            context=1024,
            cases=(ADDITIVE, SCALAR[1], *DDL, DEFAULT[-1], HYPER, MHC),
            **SMALL,
        ),
        Group(
            name="decoding, 124M, fp32, captured",
            work="decoding",
            batch=1,
            context=64,
            captured=True,
            precision="fp32",
            cases=(ADDITIVE, SCALAR[1], *DDL, DEFAULT[-1]),
            **SMALL,
        ),
    ),
)

GRADIENTS = "gradients"
"""What measures errors, not times, under this name: `benchmarks.gradients`."""
QUESTION = "How far from fp64 are the gradients of a deep model, by backend and by what is saved?"

ALL = (BAR, PEERS, GROWTH, OPERATOR, NETWORKS, GPU)
SUITES: Mapping[str, Suite] = MappingProxyType({suite.name: suite for suite in ALL})
DEPTH = "depth"
DEPTH_QUESTION = "How do state and gradient grow over 1,000 sublayers, beside the plain residual and mHC?"
QUESTIONS = {name: suite.question for name, suite in SUITES.items()} | {GRADIENTS: QUESTION, DEPTH: DEPTH_QUESTION}


def load_suite(name: str) -> Suite:
    """A named suite of timings.

    Raises:
        UserError: there is none of this name.
    """
    if name not in SUITES:
        raise unknown("suite", name, QUESTIONS)
    return SUITES[name]

"""One case of a group, built and ready to be run again and again.

Shapes: N tokens, V value channels, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.decoding import DecodingCache
from deepdelta.device import Device, compiler_problem
from deepdelta.lab.bench.config import Case, Group, Suite
from deepdelta.lab.bench.networks import SmallNetwork, images_and_labels
from deepdelta.lab.measure.agreement import agreement, loss_and_gradients
from deepdelta.lab.measure.cost import Trial
from deepdelta.lab.measure.traffic import numbers_per_token
from deepdelta.models import GPT, GPTConfig, flops, language_model, rival_problem
from deepdelta.models.attention import Attention, SwiGLU
from deepdelta.nn import ResidualConfig, use_backend, use_memory
from deepdelta.nn.parts.direction import normalisation
from deepdelta.ops.step import NEEDS, fused_problem, fused_step, rewrite_step
from deepdelta.training.config import TrainConfig
from deepdelta.training.step import backward, update

SEED = 0
NORM_EPS = 1e-5

Stage = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Subject:
    stages: tuple[Stage, ...]
    """What is run in order; the group's measures are the times to the end of each."""
    tokens: int
    """Tokens that one run of the stages works on."""
    parameters: int
    peak: Callable[[], int] | None = None
    """Peak memory of one run; None where it is not seen."""
    bytes_per_token: tuple[int, ...] = ()
    """Bytes that each measure must move at least, by formula."""
    flops_per_token: tuple[int, ...] = ()
    moved: float | None = None
    """Numbers that the residual moves per token and sublayer, forward, in units of d; None where it is not seen."""
    verify: Callable[[], float] | None = None
    """The relative error of a compiled model against the uncompiled one; None where nothing is compiled."""


def problem(group: Group, case: Case, suite: Suite) -> str | None:
    """Why a case cannot run here, or None where it can."""
    if group.captured and suite.device != "cuda":
        return "CUDA graphs need a CUDA device"
    if group.compiled and (missing := compiler_problem(suite.device)):
        return missing
    if case.rival is not None:
        return rival_problem(case.rival)
    if case.backend == "fused":
        return fused_problem(torch.device(suite.device), torch.float32)
    return None


def code_of(case: Case, device: str) -> str:
    """What does the rewrites of a case: the label that every figure carries."""
    if case.rival is not None:
        return "rival"
    return {"reference": "PyTorch", "fused": f"fused ({NEEDS[device]})", "auto": "auto"}[case.backend]


def build(group: Group, case: Case, chosen: Device) -> Subject:
    if group.work in ("training", "memory"):
        return training(group, case, chosen)
    makers = {"prefill": prefill, "decoding": decoding, "operator": operator, "network": network}
    return makers[group.work](group, case, chosen)


def added(group: Group, chosen: Device) -> Subject:
    """The case of ADDED."""
    return triad(group, chosen) if group.work == "operator" else network(group, None, chosen)


def model_config(group: Group, case: Case) -> GPTConfig:
    sizes = {name: getattr(group, name) for name in ("vocab_size", "context", "layers", "heads", "dim")}
    if case.residual is None:
        return GPTConfig(**sizes, rival=case.rival)
    return GPTConfig(**sizes, residual=case.residual)


def build_model(group: Group, case: Case, device: torch.device) -> nn.Module:
    config = model_config(group, case)
    model = language_model(config, SEED).to(device)
    if case.rival is not None:
        return model
    use_backend(model, case.backend)
    # The default of training; the reference saves what plain PyTorch saves.
    use_memory(model, "replay" if case.backend == "fused" else "save")
    return model


def random_ids(group: Group, device: torch.device, tokens: int, batch: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(group.vocab_size, (batch or group.batch, tokens), generator=generator).to(device)


def _runnable(model: nn.Module, group: Group) -> nn.Module:
    """The model, or its compiled form: whole, so that a graph break or a fall back to eager is an error."""
    return torch.compile(model, fullgraph=True) if group.compiled else model  # type: ignore[return-value]


def training(group: Group, case: Case, chosen: Device) -> Subject:
    """Forward and backward, then clipping and the fused AdamW."""
    model = build_model(group, case, chosen.device)
    ids = random_ids(group, chosen.device, group.context + 1)
    trial = Trial(model, _runnable(model, group), ids, TrainConfig(), chosen)

    def verify() -> float:
        plain = loss_and_gradients(model, model, ids, chosen)
        return agreement(loss_and_gradients(trial.forward, model, ids, chosen), plain)

    seen = chosen.device.type == "cuda" or not group.compiled
    return Subject(
        stages=(
            lambda: backward(trial.losses(trial.forward)),
            lambda: update(model, trial.optimizer, trial.config.clip),
        ),
        tokens=group.batch * group.context,
        parameters=_count(model),
        peak=trial.peak_bytes if seen else None,
        moved=None if group.compiled or group.layers < 2 else moved(group, case, chosen.device),
        verify=verify if group.compiled else None,
    )


def moved(group: Group, case: Case, device: torch.device) -> float:
    """Numbers that a case's residual reads and writes per token and sublayer, forward, in units of the width."""
    numbers = numbers_per_token(
        lambda layers: build_model(replace(group, layers=layers, bars=()), case, device),
        (Attention, SwiGLU),
        vocab_size=group.vocab_size,
        layers=group.layers,
        tokens=min(group.context, 64) // 2 * 2,
    )
    return numbers / group.dim


def prefill(group: Group, case: Case, chosen: Device) -> Subject:
    """The forward pass over whole sequences, without gradients."""
    model = build_model(group, case, chosen.device).eval()
    forward = _runnable(model, group)
    ids = random_ids(group, chosen.device, group.context)

    @torch.no_grad()
    def logits(run: nn.Module = forward) -> Tensor:
        with torch.autocast(chosen.device.type, dtype=torch.bfloat16, enabled=chosen.precision == "bf16"):
            return run(ids).logits  # type: ignore[no-any-return]

    return Subject(
        stages=(logits,),
        tokens=group.batch * group.context,
        parameters=_count(model),
        verify=(lambda: agreement({"logits": logits()}, {"logits": logits(model)})) if group.compiled else None,
    )


def decoding(group: Group, case: Case, chosen: Device) -> Subject:
    """A cache filled from empty, one token of every row at a time."""
    model = build_model(group, case, chosen.device).eval()
    assert isinstance(model, GPT)
    cache = DecodingCache(model, batch=group.batch)
    ids = random_ids(group, chosen.device, group.context)

    def run() -> None:
        cache.clear()
        for position in range(group.context):
            cache.decode(ids[:, position : position + 1])

    return Subject(
        stages=(_captured(run) if group.captured else run,),
        tokens=group.batch * group.context,
        parameters=_count(model),
    )


def _captured(run: Stage) -> Stage:
    """The run as one CUDA graph."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # what is compiled or allocated at a first call
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Operands:
    """The rewrite with the next opening on random numbers: k = h / |h|, one gate, channel compression, RMSNorm."""

    def __init__(
        self, residual: ResidualConfig, tokens: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(SEED)
        channels = residual.value_channels

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def placed(values: Tensor, kind: torch.dtype) -> Tensor:
            return values.to(device, kind).requires_grad_()

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.state, self.h = placed(normal(tokens, channels, dim), dtype), placed(normal(tokens, dim), dtype)
        self.write = placed(normal(tokens, channels), wide)
        self.erase = placed(normal(tokens, 1).sigmoid() * 2, wide)
        self.compression = None if channels == 1 else placed(normal(channels, dim), wide)
        self.weight = placed(normal(dim), wide)
        self.d_state = normal(tokens, channels, dim).to(device, dtype)
        self.d_c = normal(tokens, dim).to(device, dtype)
        self.normalise = normalisation(residual, dim)

    @property
    def leaves(self) -> list[Tensor]:
        given = (self.state, self.h, self.write, self.erase, self.compression, self.weight)
        return [tensor for tensor in given if tensor is not None]

    def forward(self, backend: str) -> tuple[Tensor, Tensor]:
        given = (self.state, self.h, self.write, self.erase, self.normalise, self.compression, self.weight, NORM_EPS)
        if backend == "reference":
            return rewrite_step(*given)
        state, c = fused_step(*given, opens=True)[:2]
        assert c is not None
        return state, c

    def backward(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self.leaves, (self.d_state, self.d_c))


def operator(group: Group, case: Case, chosen: Device) -> Subject:
    """The rewrite and the next opening, forward and backward."""
    assert case.residual is not None
    tokens = group.batch * group.context
    operands = Operands(case.residual, tokens, group.dim, _dtype(chosen), chosen.device)
    made: list[tuple[Tensor, Tensor]] = []

    def forward() -> None:
        made.append(operands.forward(case.backend))

    def backward() -> None:
        operands.backward(made.pop())

    moved = step_bytes(case.residual.value_channels, group.dim, _dtype(chosen).itemsize)
    work = step_flops(case.residual, group.dim)
    return Subject(
        stages=(forward, backward),
        tokens=tokens,
        parameters=0,
        bytes_per_token=moved,
        flops_per_token=(work, work * (1 + flops.BACKWARD)),
    )


def network(group: Group, case: Case | None, chosen: Device) -> Subject:
    """A small network's step, images as tokens; without a case in plain PyTorch."""
    made = build_network(group, case).to(chosen.device)
    images, labels = (tensor.to(chosen.device) for tensor in images_and_labels(group.batch))
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)
    return Subject(
        stages=(
            lambda: backward([F.cross_entropy(made(images), labels)]),
            lambda: update(made, optimizer, TrainConfig().clip),
        ),
        tokens=group.batch,
        parameters=_count(made),
    )


def build_network(group: Group, case: Case | None) -> SmallNetwork:
    assert group.network is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        made = SmallNetwork(group.network, group.dim, group.layers, None if case is None else case.residual)
    if case is not None:
        use_backend(made, case.backend)
    return made


def triad(group: Group, chosen: Device) -> Subject:
    """a = b + s c over as many bytes as the group's operator must move: what the machine's memory allows."""
    residual = group.cases[0].residual
    assert residual is not None
    tokens, itemsize = group.batch * group.context, _dtype(chosen).itemsize
    moved = step_bytes(residual.value_channels, group.dim, itemsize)
    counts = [tokens * part // (3 * itemsize) for part in (moved[0], moved[1] - moved[0])]

    def stage(count: int) -> Stage:
        a, b, c = (torch.ones(count, dtype=_dtype(chosen), device=chosen.device) for _ in range(3))
        return partial(torch.add, b, c, alpha=3.0, out=a)

    return Subject(
        stages=tuple(map(stage, counts)),
        tokens=tokens,
        parameters=0,
        bytes_per_token=moved,
        flops_per_token=tuple(2 * part // (3 * itemsize) for part in moved),
    )


def step_bytes(channels: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Bytes per token that the forward pass, and both passes, move at least.

    Forward reads X and h and writes X' and c': 2 (V + 1) D numbers. Backward reads X, h, dX' and dc' and writes dX and
    dh: 3 (V + 1) D. Numbers of which a token has one or V (gates, targets, scales) are left out, and parameters.
    """
    numbers = (channels + 1) * dim * itemsize
    return 2 * numbers, 5 * numbers


def step_flops(residual: ResidualConfig, dim: int) -> int:
    """Operations per token of the scale, the rewrite, the compression and the norm."""
    parts = (
        flops.direction(residual, dim),
        flops.rewrite(residual, dim),
        flops.compression(residual, dim),
        flops.rms_norm(dim),
    )
    return sum(part.total for part in parts)


def _dtype(chosen: Device) -> torch.dtype:
    return torch.bfloat16 if chosen.precision == "bf16" else torch.float32


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

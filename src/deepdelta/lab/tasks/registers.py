"""Registers along depth: each layer is told to write a symbol to a register, and at the end every register is asked.

One residual, the same for all layers, so the depth of the network is the number of instructions, and what was trained
at one depth can be tested at another. An instruction is added to what the residual reads: branch, gate and target see
it.

Shapes: B programs, T instructions, R registers, S symbols, V value channels, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from annotated_types import Len
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.config import Count, Distinct
from deepdelta.lab.tasks import fitting
from deepdelta.lab.tasks.fitting import AdamW, at_best_rate, fit, seeded, stream_of, with_norm
from deepdelta.lab.tasks.task import Progress, Task, Variant
from deepdelta.nn import ResidualConfig
from deepdelta.training.config import Positive

LONGER = 4
"""The tested depth, of the trained one."""
NEVER = -1
"""The answer for a register that was not written."""


@dataclass(frozen=True, kw_only=True)
class RegistersSettings(AdamW):
    """The machine, the sizes of the net and the recipe; a condition changes `cell`, `residual`, `out_norm`, `dim`."""

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    out_norm: Positive | None = None
    """RMSNorm of what the branch returns, its weight starting at this number; None: no norm."""
    cell: Literal["residual", "gru"] = "residual"
    """gru: PyTorch's GRUCell, which gets the instruction as its input, in the residual's place."""
    registers: Count = 8
    symbols: Count = 16
    dim: Count = 16
    hidden: Count = 64
    """Of the branch."""
    length: Count = 32
    """Instructions of the longest programs in training, drawn from 1 up; tested at four times as many."""
    rates: Annotated[tuple[Positive, ...], Distinct, Len(1)] = (6e-3, 2e-2, 6e-2)
    """The net is trained at each of these, in place of `lr`, and the one is tested whose loss on other programs of
    `length` instructions is lowest; where it is at an end of them, one further is tried, at most twice."""
    test_programs: Count = 512
    steps: Count = 1500
    batch_size: Count = 128
    lr: Positive = 2e-2


class Instructed(nn.RMSNorm):
    """The norm of what is read, plus the instruction of this layer."""

    instruction: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.instruction


class Machine(nn.Module):
    """A state that a program is run on, and a linear map that reads every register's symbol from it."""

    def __init__(self, settings: RegistersSettings, seed: int) -> None:
        super().__init__()
        dim, registers, symbols = settings.dim, settings.registers, settings.symbols
        self.register, self.symbol = nn.Embedding(registers, dim), nn.Embedding(symbols, dim)
        self.start = nn.Parameter(torch.randn(dim))
        self.cell = nn.GRUCell(dim, dim) if settings.cell == "gru" else None
        channels = 1
        if self.cell is None:
            branch = nn.Sequential(nn.Linear(dim, settings.hidden), nn.GELU(), nn.Linear(settings.hidden, dim))
            self.stream = stream_of(settings.residual, dim, seed, norm="none")
            branch = with_norm(branch, nn.RMSNorm(dim), settings.out_norm)
            self.residual = self.stream.wrap(branch, norm=Instructed(dim))
            channels = settings.residual.value_channels
        self.readout = nn.Linear(channels * dim, registers * symbols)

    def run(self, registers_BT: Int[Tensor, "B T"], symbols_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B N"]:
        """The state after all instructions, its numbers in a row."""
        told_TBD = (self.register(registers_BT) + self.symbol(symbols_BT)).movedim(1, 0)
        state = self.start.expand(len(registers_BT), -1)
        if self.cell is not None:
            for told_BD in told_TBD:
                state = self.cell(told_BD, state)
            return state
        state = self.stream.expand(state)
        for told_BD in told_TBD:
            self.residual.norm.instruction = told_BD
            state = self.residual(state)
        return state.flatten(1)

    def forward(self, registers_BT: Int[Tensor, "B T"], symbols_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B R S"]:
        """The logits of every register's symbol."""
        logits_BN: Tensor = self.readout(self.run(registers_BT, symbols_BT))
        return logits_BN.view(len(logits_BN), self.register.num_embeddings, -1)


def answers(
    registers_BT: Int[Tensor, "B T"], symbols_BT: Int[Tensor, "B T"], registers: int
) -> Int[Tensor, "B {registers}"]:
    """The symbol that each register was last written with, or NEVER."""
    held = torch.full((len(registers_BT), registers), NEVER)
    for register_B, symbol_B in zip(registers_BT.T, symbols_BT.T, strict=True):
        held.scatter_(1, register_B[:, None], symbol_B[:, None])
    return held


def run(settings: RegistersSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train a machine at every rate, and test the one that does best on programs of the trained length.

    Returns:
        accuracy: share of the written registers whose symbol is right after LONGER times the trained length, on
        programs drawn anew; accuracy_trained: after the trained length; loss: at LONGER times it, in nats per register.
        growth: the root mean square of the state there, over that at the trained length. lr: the rate that was taken.

    Raises:
        Diverged: at every rate.
    """
    generator = Generator()

    def begin(part: int) -> None:
        """The programs of training, of the choice of a rate or of the test, the same in all conditions."""
        generator.manual_seed(3 * seed + part)

    def programs(count: int, length: int) -> tuple[Tensor, Tensor]:
        sizes = (settings.registers, settings.symbols)
        registers, symbols = (torch.randint(size, (count, length), generator=generator) for size in sizes)
        return registers, symbols

    def loss_of(machine: Machine, program: tuple[Tensor, Tensor]) -> Tensor:
        right = answers(*program, settings.registers)
        return F.cross_entropy(machine(*program).flatten(0, 1), right.flatten(), ignore_index=NEVER)

    def trained(rate: float, progress: Progress) -> Machine:
        begin(0)
        with seeded(seed):
            machine = Machine(settings, seed)

        def loss(step: int) -> Tensor:
            length = int(torch.randint(1, settings.length + 1, (), generator=generator))
            return loss_of(machine, programs(settings.batch_size, length))

        fit(machine, loss, replace(settings, lr=rate), progress)
        return machine

    @torch.no_grad()
    def loss_as_trained(machine: Machine) -> float:
        begin(1)
        return loss_of(machine, programs(settings.test_programs, settings.length)).item()

    machine, rate = at_best_rate(settings.rates, trained, loss_as_trained, progress)
    begin(2)
    return _tested(machine, programs, loss_of, settings) | {"lr": rate}


@torch.no_grad()
def _tested(
    machine: Machine,
    programs: Callable[[int, int], tuple[Tensor, Tensor]],
    loss_of: Callable[[Machine, tuple[Tensor, Tensor]], Tensor],
    settings: RegistersSettings,
) -> dict[str, float]:
    found: dict[str, float] = {}
    sizes = []
    for name, length in (("accuracy_trained", settings.length), ("accuracy", LONGER * settings.length)):
        program = programs(settings.test_programs, length)
        right = answers(*program, settings.registers)
        found[name] = (machine(*program).argmax(-1) == right)[right != NEVER].double().mean().item()
        sizes.append(machine.run(*program).square().mean().sqrt().item())
    return found | {"loss": loss_of(machine, program).item(), "growth": sizes[1] / sizes[0]}


WIDE = {"dim": 64, "residual": {"rule": "additive", "value_channels": 1}}

TASK = Task(
    settings=RegistersSettings(),
    conditions=fitting.CONDITIONS
    | {
        "normed": fitting.NORMED,
        "additive-wide": Variant(
            summary="x + F(norm(x)) at width 64: a state as large as that of V = 4, 18,304 parameters (additive 4,720, "
            "delta-4 11,073)",
            changes=WIDE,
        ),
        "default-4": fitting.DEFAULT_4,
        "gru": Variant(
            summary="a GRU: gates for every number of the state",
            changes={"cell": "gru", "residual": {"rule": "additive", "value_channels": 1}},
        ),
        "gru-wide": Variant(summary="a GRU of width 64, 34,880 parameters", changes={"cell": "gru"} | WIDE),
    },
    baseline="additive",
    primary="accuracy",
    unit="share of registers right after 4 times as many instructions as in training",
    higher_is_better=True,
    refuted="the write-only twin with four value channels is within 0.05 of delta-4",
    run=run,
    replaced={"lr": "rates"},
)

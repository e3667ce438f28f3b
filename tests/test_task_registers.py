"""Registers along depth: what is asked, what the machines compute, which rate is taken, and that they learn."""

import math
from typing import Any

import pytest
import torch
from torch import Generator, nn

from deepdelta.lab.tasks import load_task, registers
from deepdelta.lab.tasks.fitting import Diverged, at_best_rate
from deepdelta.lab.tasks.registers import NEVER, Machine, answers
from deepdelta.ops import delta_rewrite

pytestmark = pytest.mark.usefixtures("unchecked_file")

TASK = load_task("registers")
SMALL: dict[str, Any] = {"registers": 2, "symbols": 3, "dim": 8, "hidden": 16, "length": 4, "test_programs": 64}


def nothing(done: int, total: int) -> None:
    pass


def programs(count: int, length: int, sizes: tuple[int, int] = (2, 3)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = Generator().manual_seed(4)
    return tuple(torch.randint(size, (count, length), generator=generator) for size in sizes)  # type: ignore[return-value]


def machine(condition: str, **changes: Any) -> Machine:
    torch.manual_seed(0)
    return Machine(TASK.settings_of(condition, {**SMALL, **changes}), seed=0)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_the_answer_is_what_was_written_last(length: int) -> None:
    registers_BT, symbols_BT = programs(20, length, (8, 16))
    found = answers(registers_BT, symbols_BT, 8)
    for row, program in enumerate(zip(registers_BT.tolist(), symbols_BT.tolist(), strict=True)):
        held = dict(zip(*program, strict=True))
        assert found[row].tolist() == [held.get(register, NEVER) for register in range(8)]


def test_the_plain_machine_adds_what_its_branch_makes_of_the_norm_and_the_instruction() -> None:
    net, program = machine("additive").double(), programs(5, 6)
    branch, scale = net.residual.branch, net.residual.norm.weight
    assert isinstance(branch, nn.Module)
    x = net.start.expand(5, -1)
    for register_B, symbol_B in zip(program[0].T, program[1].T, strict=True):
        told = net.register.weight[register_B] + net.symbol.weight[symbol_B]
        x = x + branch(scale * x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() + told)
    expected = net.readout(x).unflatten(-1, (2, 3))
    torch.testing.assert_close(net(*program), expected, rtol=1e-10, atol=1e-10)


def test_the_delta_machine_reads_target_and_gate_from_the_instruction_too() -> None:
    """Its dense form, with the parts of its own residual."""
    net, program = machine("delta-4").double(), programs(5, 6)
    residual = net.residual
    state = net.stream.expand(net.start.expand(5, -1))
    for register_B, symbol_B in zip(program[0].T, program[1].T, strict=True):
        told = net.register.weight[register_B] + net.symbol.weight[symbol_B]
        read = residual.compression_part()(state)
        c = torch.nn.functional.rms_norm(read, (8,), residual.norm.weight) + told
        h = residual.branch(c)  # type: ignore[misc]
        k, beta = h / h.norm(dim=-1, keepdim=True), residual.gate(c)[0]  # type: ignore[misc]
        (v,) = residual.target(None, c, h, (k,))  # type: ignore[misc]
        state = delta_rewrite(state, k, v, beta.squeeze(-1) if beta.ndim == 2 else beta)
    torch.testing.assert_close(net.run(*program), state.flatten(1), rtol=1e-8, atol=1e-8)


def test_a_gru_gets_the_instruction_as_its_input() -> None:
    net, (registers_BT, symbols_BT) = machine("gru"), programs(5, 6)
    told = net.register(registers_BT) + net.symbol(symbols_BT)
    layer = nn.GRU(8, 8, batch_first=True)
    layer.load_state_dict({f"{name}_l0": value for name, value in net.cell.state_dict().items()})
    last = layer(told, net.start.expand(1, 5, -1).contiguous())[1][0]
    torch.testing.assert_close(net.run(registers_BT, symbols_BT), last)


def test_a_run_is_the_same_again_and_takes_the_best_of_its_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    settings = TASK.settings_of("delta", SMALL | {"steps": 20, "rates": [1e-5, 1e-2]})
    found = TASK.run(settings, 1, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (40, 40)
    assert found["lr"] in (1e-2, 10.0) and found == TASK.run(settings, 1, nothing) != TASK.run(settings, 2, nothing)
    alone = TASK.settings_of("delta", SMALL | {"steps": 20, "rates": [found["lr"]]})
    assert TASK.run(alone, 1, nothing) == found


def test_rates_grow_where_the_best_is_at_an_end_of_them() -> None:
    """By the ratio to its neighbour, at most twice; one that diverges there ends it; a single one stays alone."""

    def taken(best: float, rates: tuple[float, ...], fails: float = 1e9) -> tuple[float, list[float]]:
        tried: list[float] = []

        def trained(rate: float, progress: Any) -> float:
            tried.append(rate)
            if rate >= fails:
                raise Diverged("too high")
            return rate

        made, rate = at_best_rate(rates, trained, lambda rate: abs(math.log(rate / best)), nothing)
        assert made == rate
        return rate, tried

    assert taken(1.0, (0.5, 1.0, 2.0)) == (1.0, [0.5, 1.0, 2.0])
    assert taken(4.0, (0.5, 1.0, 2.0)) == (4.0, [0.5, 1.0, 2.0, 4.0, 8.0])
    assert taken(99.0, (2.0, 0.5, 1.0)) == (8.0, [2.0, 0.5, 1.0, 4.0, 8.0])
    assert taken(0.2, (0.5, 1.0, 2.0)) == (0.25, [0.5, 1.0, 2.0, 0.25, 0.125])
    assert taken(99.0, (0.5, 1.0, 2.0), fails=4.0) == (2.0, [0.5, 1.0, 2.0, 4.0])
    assert taken(99.0, (1.0,)) == (1.0, [1.0])


def test_a_rate_that_diverges_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registers.fit

    def fit(model: nn.Module, loss_of: Any, recipe: Any, progress: Any) -> None:
        if recipe.lr > 1:
            raise Diverged("too high")
        real(model, loss_of, recipe, progress)

    monkeypatch.setattr(registers, "fit", fit)
    settings = SMALL | {"steps": 2}
    found = TASK.run(TASK.settings_of("gru", settings | {"rates": [2.0, 1e-2, 3.0]}), 0, nothing)
    assert found["lr"] == 1e-2
    with pytest.raises(Diverged, match="no loss stayed finite at the rates"):
        TASK.run(TASK.settings_of("gru", settings | {"rates": [2.0, 3.0]}), 0, nothing)

    def overflow(model: nn.Module, loss_of: Any, recipe: Any, progress: Any) -> None:
        """At the last step, after which nobody looks."""
        real(model, loss_of, recipe, progress)
        if recipe.lr > 1:
            nn.init.constant_(next(model.parameters()), math.nan)

    monkeypatch.setattr(registers, "fit", overflow)
    assert TASK.run(TASK.settings_of("gru", settings | {"rates": [2.0, 1e-2]}), 0, nothing)["lr"] == 1e-2


def test_the_sizes_that_the_summaries_name() -> None:
    sizes = {
        name: sum(parameter.numel() for parameter in Machine(TASK.settings_of(name), 0).parameters())
        for name in ("additive", "additive-wide", "delta-4", "gru-wide")
    }
    assert sizes == {"additive": 4720, "additive-wide": 18304, "delta-4": 11073, "gru-wide": 34880}
    assert "18,304 parameters (additive 4,720, delta-4 11,073)" in TASK.conditions["additive-wide"].summary
    assert "34,880" in TASK.conditions["gru-wide"].summary


def test_chance_and_what_is_learned() -> None:
    """A machine that is asked for the last symbol of two registers beats one that was never trained."""
    settings = SMALL | {"steps": 250, "rates": [2e-2]}
    assert TASK.run(TASK.settings_of("delta-4", settings), 0, nothing)["accuracy_trained"] > 0.9
    assert TASK.run(TASK.settings_of("delta-4", settings | {"steps": 1}), 0, nothing)["accuracy_trained"] < 0.6

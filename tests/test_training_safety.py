"""A step whose loss or gradient is not finite: skipped, counted, and named when there are too many in a row."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepdelta import GPT, UserError, train
from deepdelta.models import GPTConfig
from deepdelta.nn.presets import PRESETS
from deepdelta.training import RunDirectory, trainer
from deepdelta.training import step as step_module
from deepdelta.training.health import Health, first_not_finite, health
from deepdelta.training.optimizer import build_optimizer
from deepdelta.training.step import training_step
from tiny_runs import assert_same_run, config, quietly, rows, tensors, text_file

pytestmark = pytest.mark.usefixtures("unchecked_file")

LAYER = "layers.0.mlp.branch.gate"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def ruin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a layer's output, or the gradient through it, be not finite in some steps of the runs that follow."""

    def ruined(*steps: int, how: str = "output") -> None:
        now = {"step": 0}
        real_batch, real_model = step_module.batch, trainer.Trainer.__init__

        def batch(*arguments: Any, step: int, **options: Any) -> Any:
            now["step"] = step + 1
            return real_batch(*arguments, step=step, **options)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if now["step"] not in steps or not module.training:
                return None
            if how == "output":
                return output * torch.tensor([math.nan] + [1.0] * (output.shape[-1] - 1))
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * math.inf)
            return None

        def init(self: trainer.Trainer, *arguments: Any) -> None:
            real_model(self, *arguments)
            self.model.get_submodule(LAYER).register_forward_hook(hook)

        monkeypatch.setattr(step_module, "batch", batch)
        monkeypatch.setattr(trainer.Trainer, "__init__", init)

    return ruined


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """A signal arrives during that step."""
    with pytest.MonkeyPatch.context() as patch:
        real, arrived = trainer.Trainer._one_step, []

        def one_step(self: trainer.Trainer) -> None:
            real(self)
            if self.step == step:
                arrived.append(step)

        patch.setattr(trainer.Trainer, "_one_step", one_step)
        patch.setattr(trainer, "stop_signals", lambda: nullcontext(lambda: bool(arrived)))
        yield


def skips(run: Path) -> list[tuple[int, int]]:
    return [(row["step"], row["skipped"]) for row in rows(run) if "skipped" in row]


@pytest.mark.parametrize("how", ["output", "gradient"])
def test_a_skipped_step_changes_nothing_and_is_counted(
    source: Path, tmp_path: Path, ruin: Callable[..., None], how: str
) -> None:
    """The run goes on; stopped right after the skip, at it and in the midst of a row, it ends in the same numbers."""
    ruin(4, 9, 10, 13, how=how)
    whole, run = tmp_path / "whole", tmp_path / "run"
    lines: list[str] = []
    assert quietly(config(source), whole).finished
    assert skips(whole) == [(4, 1), (9, 2), (10, 3), (13, 4)]
    assert [row["step"] for row in rows(whole) if "loss" in row] == [n for n in range(1, 21) if n not in (4, 9, 10, 13)]
    assert all(tensor.isfinite().all() for tensor in tensors(whole).values())
    steps = {name: tensor for name, tensor in tensors(whole).items() if name.endswith(".step")}
    assert {tensor.item() for tensor in steps.values()} == {16.0}
    for stop in (9, 10):
        with stopped_after(stop):
            train(config(source), run, say=lines.append)
    # What is saved must have a next step whose loss is finite.
    saved = "saved at step 7" if how == "output" else "saved"
    assert [line for line in lines if line.startswith("Stopped")] == [
        f"Stopped at step 9 of 20, {saved}. The same command continues.",
        "Stopped at step 10 of 20, saved. The same command continues.",
    ]
    quietly(config(source), run)
    assert_same_run(run, whole)


def test_the_weights_after_a_skip_are_those_before(source: Path, tmp_path: Path, ruin: Callable[..., None]) -> None:
    ruin(4)
    quietly(config(source, schedule="constant", steps=3), tmp_path / "run")
    before = tensors(tmp_path / "run")
    quietly(config(source, schedule="constant", steps=4), tmp_path / "run")
    after = tensors(tmp_path / "run")
    assert all(before[name].equal(after[name]) for name in before | after)


@pytest.mark.parametrize(("how", "named"), [("output", f"'{LAYER}'"), ("gradient", "every layer's output is finite")])
def test_three_in_a_row_stop_the_run_and_name_the_layer(
    source: Path, tmp_path: Path, ruin: Callable[..., None], how: str, named: str
) -> None:
    """Also where the run was stopped between them, and with the settings that let it go on."""
    ruin(4, 9, 10, 11, how=how)
    run = tmp_path / "run"
    message = rf"at step 11, 3 such steps in a row \(.*{named}\): training diverged\. The last .* at step {{}} in "
    with pytest.raises(UserError, match=message.format(7)):
        quietly(config(source), run)
    assert skips(run) == [(4, 1), (9, 2), (10, 3)] and rows(run)[-1] == {"step": 11, "diverged": True}
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    with pytest.raises(UserError, match=message.format(7)):
        quietly(config(source), run)  # continued, it comes to the same end
    # Where only the gradient is not finite, the step before may be a checkpoint, since the loss is.
    good = 7 if how == "output" else 10
    with pytest.raises(UserError, match=message.format(good)):
        quietly(config(source, checkpoint_every=1), run)
    with pytest.raises(UserError, match=message.format(good)):
        quietly(config(source, checkpoint_every=1), run)
    assert quietly(config(source, not_finite=4), copy).finished
    assert skips(copy) == [(4, 1), (9, 2), (10, 3), (11, 4)]


def test_the_numbers_are_read_together_on_an_accelerator(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ruin: Callable[..., None]
) -> None:
    """The same lines and checkpoint, whatever is read when; nothing is read before it is due."""
    ruin(9, 10)
    quietly(config(source), tmp_path / "run")
    real, read = trainer.Trainer.__init__, []

    def init(self: trainer.Trainer, *arguments: Any) -> None:
        real(self, *arguments)
        self.read_every = 5

    monkeypatch.setattr(trainer.Trainer, "__init__", init)
    real_read = trainer.Trainer._read

    def note(self: trainer.Trainer, *arguments: Any) -> None:
        read.append((self.step, len(self.unread)))
        real_read(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_read", note)
    quietly(config(source), tmp_path / "other")
    assert read == [(5, 5), (7, 2), (8, 1), (13, 5), (14, 1), (16, 2), (20, 4)]
    assert_same_run(tmp_path / "run", tmp_path / "other")


def losses(model: nn.Module, factor: float) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield (parameter.square().sum() * factor).requires_grad_()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_neither_weights_nor_the_optimiser_move(fused: bool, factor: float) -> None:
    """By the fused step, which decides on the device, and by another one."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = build_optimizer(model, trainer.TrainConfig()) if fused else torch.optim.Adam(model.parameters())
    assert all(math.isfinite(value) for value in training_step(model, optimizer, losses(model, 1.0), clip=1.0).read())

    def held() -> list[Tensor]:
        state = [value for values in optimizer.state.values() for value in values.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]

    before = held()
    loss, norm = training_step(model, optimizer, losses(model, factor), clip=1.0).read()
    assert not (math.isfinite(loss) and math.isfinite(norm))
    assert all(a.equal(b) for a, b in zip(held(), before, strict=True))
    training_step(model, optimizer, losses(model, 1.0), clip=1.0)
    assert not any(a.equal(b) for a, b in zip(held(), before, strict=True))


def gpt(preset: str = "paper-cc") -> GPT:
    sizes = {"vocab_size": 13, "context": 8, "layers": 2, "heads": 2, "dim": 16}
    return GPT(GPTConfig(**sizes, residual=PRESETS[preset]))  # type: ignore[arg-type]


def test_the_first_layer_that_is_not_finite() -> None:
    model, ids = gpt(), torch.zeros(1, 3, dtype=torch.long)
    assert first_not_finite(model, lambda: model(ids)) is None
    with torch.no_grad():
        model.layers[1].attention.branch.query.weight[0, 0] = math.inf
    assert first_not_finite(model, lambda: model(ids)) == "layers.1.attention.branch.query"
    with torch.no_grad():
        model.embedding.weight[0] = math.nan
    assert first_not_finite(model, lambda: model(ids)) == "embedding"
    assert not any(module._forward_hooks for module in model.modules())


def test_gates_and_growth_are_those_of_the_rewrites(source: Path, tmp_path: Path) -> None:
    """Against gates set by hand: the biases of a model whose gates do not look at their input."""
    model, ids = gpt(), torch.arange(8).unsqueeze(0)
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    betas = [0.004, 0.5, 1.0, 1.995]
    with torch.no_grad():
        for gate, beta in zip([gate for gate in gates if hasattr(gate, "outer")], betas, strict=True):
            gate.outer.weight.zero_()
            gate.outer.bias.fill_(math.log(beta / (2 - beta)))
    found = health(model, ids)
    assert found is not None and found.gate_mean == pytest.approx(sum(betas) / 4, rel=1e-5)
    assert (found.gates_dead, found.gates_saturated) == (0.25, 0.25)
    plain = health(gpt("additive"), ids)
    assert plain is not None and plain.row.keys() == {"state_growth"} and plain.state_growth > 0
    quietly(config(source), tmp_path / "run")
    validated = [row for row in RunDirectory(tmp_path / "run").metrics() if "validation_loss" in row]
    assert all(("state_growth" in row) != row["final"] and ("gate_mean" in row) != row["final"] for row in validated)


def test_a_run_is_warned_of_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ill = Health(gate_mean=0.1, gates_dead=0.6, gates_saturated=0.4, state_growth=250.0)
    monkeypatch.setattr(trainer, "health", lambda model, ids: ill)
    quietly(config(source), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("Warning: 60% of the gates are below 0.01") == 1 and "grows 250 times" in said
    assert Health(gate_mean=1.0, gates_dead=0.4, gates_saturated=0.4, state_growth=9.0).warning is None

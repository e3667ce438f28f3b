"""Averages of the weights: those of the formula over every step's weights, and the same to the bit after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta import UserError, load
from deepdelta.cli import main
from deepdelta.training import RunDirectory
from deepdelta.training.checkpoints import earlier, read_checkpoint
from tiny_runs import assert_same_run, config, quietly, rows, text_file

pytestmark = pytest.mark.usefixtures("unchecked_file")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def weights(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """After every step of a run without an average."""
    run = tmp_path_factory.mktemp("every") / "run"
    quietly(settings(source, checkpoint_every=1, keep_last=100), run)
    return [read_checkpoint(file).weights for file in reversed(earlier(run))][1:]


def settings(source: Path, **changes: Any) -> Any:
    return config(source, steps=12, schedule="constant", eval_every=12, **changes)


def expected(weights: list[dict[str, Tensor]], average: str) -> dict[str, Tensor]:
    """In fp64: the EMA with 0.7 of what was before, or the mean of the last five."""
    made = {name: tensor.double() for name, tensor in weights[0].items()}
    for later in weights[1:]:
        made = {name: 0.7 * tensor + 0.3 * later[name].double() for name, tensor in made.items()}
    if average == "ema":
        return made
    return {name: torch.stack([one[name].double() for one in weights[-5:]]).mean(0) for name in made}


@pytest.mark.parametrize("average", ["ema", "last"])
def test_averages_are_those_of_the_weights_after_each_step(
    source: Path, weights: list[dict[str, Tensor]], tmp_path: Path, average: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    given = {"average": average} | ({"ema_decay": 0.7} if average == "ema" else {"average_steps": 5})
    quietly(settings(source, **given), whole)
    made = RunDirectory(whole).checkpoint("average.safetensors")
    assert made.step == 12 and not made.optimizer
    for name, tensor in expected(weights, average).items():
        torch.testing.assert_close(made.weights[name].double(), tensor, rtol=1e-5, atol=1e-6)
    # The weights themselves are as without it.
    last = RunDirectory(whole).checkpoint().weights
    assert all(last[name].equal(tensor) for name, tensor in weights[-1].items())
    final = rows(whole)[-1]
    assert final["final"] and final["average_loss"] != final["validation_loss"]
    capsys.readouterr()
    main(["evaluate", str(whole), "--device", "cpu", "--checkpoint", "average.safetensors"])
    assert f"loss            {final['average_loss']:.4f} nats" in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in load(whole, "average.safetensors").model.parameters())
    # Killed in the midst of the average, after the checkpoint of step 10: bit for bit.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepdelta.training.trainer.Trainer._validate", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quietly(settings(source, **given | {"checkpoint_every": 10}), run)
    assert RunDirectory(run).step() == 10
    quietly(settings(source, **given), run)
    assert_same_run(run, whole)
    there, here = (RunDirectory(one).checkpoint("average.safetensors").weights for one in (whole, run))
    assert all(there[name].equal(here[name]) for name in there | here)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("given", [{"ema_decay": 0.5}, {"average_steps": 3, "average": "ema"}], ids=str)
def test_settings_of_an_average_that_is_not_made_are_refused(source: Path, given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(given))}=\S+ has no effect where average is not '(ema|last)'"):
        config(source, **given)


def test_of_an_extended_run_what_was_averaged_before_is_left_out(
    source: Path, weights: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """Steps 8, 9 and 10 of a run of 10 are not among the last three of one of 12; averaged are 11 and 12."""
    run, given = tmp_path / "run", {"average": "last", "average_steps": 3}
    for steps in (10, 12):
        quietly(config(source, schedule="constant", eval_every=12, steps=steps, **given), run)
    made = RunDirectory(run).checkpoint("average.safetensors").weights
    for name in made:
        mean = (weights[10][name].double() + weights[11][name].double()) / 2
        torch.testing.assert_close(made[name].double(), mean, rtol=1e-5, atol=1e-6)

"""A run directory: what it holds, how it continues, and what it refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdelta import GPT, TrainConfig, UserError, load, train
from deepdelta.config import to_plain
from deepdelta.data import load_corpus
from deepdelta.training import RunDirectory
from deepdelta.training.metrics import append_json
from deepdelta.training.optimizer import build_optimizer
from deepdelta.training.step import step_batch
from tiny_runs import ENVIRONMENT, assert_same_run, config, quietly, rows, tensors, text_file

pytestmark = pytest.mark.usefixtures("unchecked_file")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which tests only read or copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    quietly(config(source), run)
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def refused(message: str, settings: TrainConfig, run: Path, **options: Any) -> None:
    """The run is refused, and its directory is as it was."""
    before = contents(run) if run.exists() else None
    with pytest.raises(UserError, match=message):
        quietly(settings, run, **options)
    assert (contents(run) if run.exists() else None) == before


def test_what_a_run_directory_holds(finished: Path, source: Path) -> None:
    assert set(contents(finished)) == {
        *("config.json", "environment.json", "metrics.jsonl", "tokenizer.json", "checkpoint.safetensors"),
    }
    plain = json.loads((finished / "config.json").read_text())
    assert plain == to_plain(config(source, model={"vocab_size": 256}))
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["threads"] == 1
    assert environment["device"] == "cpu" and environment["precision"] == "fp32" and environment["init_from"] is None
    assert len(environment["corpus_sha256"]) == 64
    assert environment["validation_bytes"] == source.stat().st_size - int(source.stat().st_size * 0.9)


def test_what_metrics_hold(finished: Path) -> None:
    steps = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert all(row["gradient_norm"] > 0 for row in steps)
    validations = [(row["step"], row["final"]) for row in rows(finished) if "validation_loss" in row]
    assert validations == [(8, False), (16, False), (20, False), (20, True)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    seconds = [row["seconds"] for row in RunDirectory(finished).metrics()]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_same_settings_give_the_same_run_and_another_seed_another(
    finished: Path, source: Path, tmp_path: Path
) -> None:
    quietly(config(source), tmp_path / "again")
    assert_same_run(finished, tmp_path / "again")
    quietly(config(source, seed=1), tmp_path / "other")
    assert all(a["loss"] != b["loss"] for a, b in zip(rows(finished)[:5], rows(tmp_path / "other")[:5], strict=True))


def test_an_offset_draws_other_weights_for_the_same_batches(finished: Path, source: Path, tmp_path: Path) -> None:
    """Its first loss is that of the weights of another seed on this seed's first batch."""
    quietly(config(source, init_offset=7), tmp_path / "run")
    settings = RunDirectory(finished).config()
    model = GPT(settings.model, settings.seed + 7)
    inputs, labels = step_batch(settings, load_corpus(settings.data), 0)
    loss = model(inputs, labels).loss
    assert loss is not None
    ours, others = rows(tmp_path / "run")[0]["loss"], rows(finished)[0]["loss"]
    assert ours == pytest.approx(loss.item(), rel=1e-6) and ours != others


def test_a_finished_run_is_left_as_it_is(copy: Path, source: Path) -> None:
    before = contents(copy)
    lines: list[str] = []
    result = train(config(source), copy, say=lines.append)
    assert contents(copy) == before
    assert result.finished and result.step == 20 and result.validation_loss == rows(copy)[-1]["validation_loss"]
    assert lines[-1] == f"{copy} has all its 20 steps; give more --steps to extend it."


def test_more_steps_extend_a_run_and_fewer_are_refused(copy: Path, source: Path) -> None:
    first = rows(copy)
    refused("is at step 20 already; steps=19 must not be fewer", config(source, steps=19), copy)
    result = quietly(config(source, steps=25), copy)
    assert result.finished and result.step == 25
    assert rows(copy)[: len(first)] == first
    assert [row["step"] for row in rows(copy)[len(first) :]] == [21, 22, 23, 24, 24, 25, 25, 25]
    assert rows(copy)[-1]["final"] and RunDirectory(copy).config().steps == 25
    refused("is at step 25 already; steps=20 must not be fewer", config(source), copy)


def test_a_rate_that_jumps_is_said(finished: Path, copy: Path, source: Path) -> None:
    """A finished cosine that is extended goes back up; the numbers are those of the recorded rates."""
    lines: list[str] = []
    train(config(source, steps=40), copy, say=lines.append)
    rates = [row["lr"] for row in rows(copy) if "lr" in row]
    assert rates[19] == pytest.approx(2e-4) and rates[20] == pytest.approx(1.18e-3, rel=0.01)
    (said,) = [line for line in lines if "learning rate" in line]
    assert said.startswith(f"The learning rate jumps from {rates[19]:.3g} to {rates[20]:.3g} at step 21: ")
    assert "of 40 steps now, and was that of 20" in said and "schedule='constant'" in said
    lines.clear()
    train(config(source, steps=40), copy, say=lines.append)
    assert not any("learning rate" in line for line in lines)


def test_a_constant_rate_is_extended_as_if_it_had_been_longer(source: Path, tmp_path: Path) -> None:
    """Bit for bit, also where only the last extension comes down; and nothing is said, since nothing jumps."""
    lines: list[str] = []
    run, reference = tmp_path / "run", tmp_path / "reference"
    for steps, cooldown in ((5, 0), (8, 0), (16, 6)):
        train(config(source, schedule="constant", steps=steps, cooldown=cooldown), run, say=lines.append)
    quietly(config(source, schedule="constant", steps=16, cooldown=6), reference)
    assert not any("learning rate" in line for line in lines)
    steps, expected = ([row for row in rows(one) if "loss" in row] for one in (run, reference))
    assert steps == expected and rows(run)[-1] == rows(reference)[-1]
    made, whole = tensors(run), tensors(reference)
    assert all(made[name].equal(whole[name]) for name in made | whole)
    rates = [row["lr"] for row in steps]
    assert rates[3:10] == [2e-3] * 7 and rates[10:] == pytest.approx([1.7e-3, 1.4e-3, 1.1e-3, 8e-4, 5e-4, 2e-4])


def test_what_does_not_touch_the_steps_made_may_change(copy: Path, source: Path) -> None:
    quietly(config(source, steps=21, eval_every=3, eval_tokens=32, checkpoint_every=2, final_eval_tokens=16), copy)
    assert rows(copy)[-1]["validation_tokens"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "another configuration .lr: 0.002 there, 0.5 here"),
        ({"model": {"dim": 32}}, "model.dim: 16 there, 32 here"),
        (
            {"model": {"residual": {"rule": "write_only"}}},
            "model.residual.rule: 'additive_erase' there, 'write_only' here",
        ),
        ({"seed": 3, "batch_size": 4}, "batch_size: 2 there, 4 here; seed: 0 there, 3 here"),
        ({"data": {"validation_fraction": 0.2}}, "data.validation_fraction: 0.1 there, 0.2 here"),
    ],
)
def test_another_configuration_is_refused(copy: Path, source: Path, changes: dict[str, Any], message: str) -> None:
    refused(message, config(source, steps=30, **changes), copy)


def edit(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    environment = json.loads((copy / "environment.json").read_text())
    change(environment)
    (copy / "environment.json").write_text(json.dumps(environment))


@pytest.mark.parametrize("key", ["versions", "machine", "threads", "device", "precision"])
def test_another_environment_is_refused_unless_inexact(copy: Path, source: Path, key: str) -> None:
    def change(environment: dict[str, Any]) -> None:
        if isinstance(environment[key], dict):
            environment[key][next(iter(environment[key]))] = "another"
        else:
            environment[key] = 99 if key == "threads" else "another"

    edit(copy, change)
    refused(f"another environment .{key}.*('another'|99) there.*--inexact-resume", config(source, steps=22), copy)
    assert quietly(config(source, steps=22), copy, inexact_resume=True).step == 22


def test_another_corpus_is_refused_always(copy: Path, tmp_path: Path) -> None:
    mine = text_file(tmp_path / "text.txt")
    edit_path = json.loads((copy / "config.json").read_text())
    edit_path["data"]["source"] = str(mine)
    (copy / "config.json").write_text(json.dumps(edit_path))
    assert quietly(config(mine, steps=21), copy).step == 21  # the same bytes at another place are the same corpus
    mine.write_text(mine.read_text(encoding="utf-8").replace("gate", "gait"), encoding="utf-8")
    for inexact in (False, True):
        refused("trained on another corpus .corpus_sha256", config(mine, steps=22), copy, inexact_resume=inexact)


def test_another_tokenizer_is_refused_always(copy: Path, source: Path) -> None:
    edit(copy, lambda environment: environment.update(tokenizer_sha256="another"))
    refused("another corpus .tokenizer_sha256", config(source, steps=22), copy, inexact_resume=True)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.999, 0.99999])
def test_a_truncated_checkpoint(copy: Path, source: Path, share: float) -> None:
    file = copy / "checkpoint.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    message = "checkpoint.safetensors is truncated or damaged .*restore a copy, or delete .* and train anew"
    refused(message, config(source, steps=22), copy)
    with pytest.raises(UserError, match=message):
        load(copy)


def test_a_run_without_its_checkpoint(copy: Path, source: Path) -> None:
    (copy / "checkpoint.safetensors").unlink()
    refused("holds no checkpoint.safetensors", config(source, steps=22), copy)


def test_weights_that_do_not_fit(copy: Path) -> None:
    run, settings = RunDirectory(copy), RunDirectory(copy).config()
    with pytest.raises(UserError, match=r"'embedding.weight' has shape \(256, 16\), the model's has \(256, 32\)"):
        run.load_weights(GPT(replace(settings.model, dim=32)))
    with pytest.raises(UserError, match=r"missing tensors \['layers.1.attention"):
        run.load_weights(GPT(replace(settings.model, layers=2)))


def test_a_half_written_last_line_of_metrics(copy: Path, source: Path) -> None:
    metrics = copy / "metrics.jsonl"
    whole = metrics.read_text()
    run = RunDirectory(copy)
    for rest in ("{", '{"step": 21, "loss": 4.', '{"step": 21, "loss": 4.0}'):
        metrics.write_text(whole + rest)
        assert len(list(run.metrics())) == len(whole.splitlines()) and run.last_recorded_step() == 20
    quietly(config(source, steps=22), copy)
    assert [row["step"] for row in rows(copy) if "loss" in row] == list(range(1, 23))


def test_metrics_are_cut_back_to_the_checkpoint(copy: Path, source: Path) -> None:
    whole = (copy / "metrics.jsonl").read_text()
    step = {"step": 21, "loss": 9.0, "lr": 1e-3, "gradient_norm": 1.0, "seconds": 9.0}
    append_json(copy / "metrics.jsonl", step)
    append_json(copy / "metrics.jsonl", {"step": 22, "diverged": True})
    quietly(config(source), copy)
    assert (copy / "metrics.jsonl").read_text() == whole


def test_last_recorded_step_of_a_long_file(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.last_recorded_step() == 0
    (tmp_path / "metrics.jsonl").touch()
    assert run.last_recorded_step() == 0
    rest = '"loss": 1.0, "lr": 0.1, "gradient_norm": 1.0, "seconds": 1.0'
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, {rest}}}\n' for i in range(1, 3000)))
    assert run.last_recorded_step() == 2999


def test_a_second_process_is_refused(copy: Path, source: Path) -> None:
    script = (
        "import fcntl, sys, time\nlock = open(sys.argv[1], 'w')\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\ntime.sleep(60)\n"
    )
    held = [sys.executable, "-c", script, str(copy / ".lock")]
    assert not RunDirectory(copy).busy
    with subprocess.Popen(held, stdout=subprocess.PIPE, env=ENVIRONMENT) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert RunDirectory(copy).busy
        refused("another process is training in .*copy; wait for it or stop it", config(source, steps=22), copy)
        other.kill()
    assert not RunDirectory(copy).busy
    assert quietly(config(source, steps=22), copy).step == 22


def test_init_from(finished: Path, copy: Path, source: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    quietly(config(source, steps=2, seed=5), new, init_from=finished)
    assert json.loads((new / "environment.json").read_text())["init_from"] == str(finished)
    # The first step sees the finished run's weights: its loss is far below that of a fresh start.
    assert rows(new)[0]["loss"] < 5.2 < rows(finished)[0]["loss"]
    refused(
        "already holds a run, started from new weights; --init-from", config(source, steps=30), copy, init_from=finished
    )
    refused("is not a run directory", config(source), tmp_path / "other", init_from=tmp_path / "absent")
    refused("does not fit this model", config(source, model={"dim": 8}), tmp_path / "other", init_from=finished)
    refused("leave init_offset or init_from out", config(source, init_offset=3), tmp_path / "other", init_from=finished)


def test_init_from_takes_the_weights_and_no_optimiser_state(
    finished: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: object) -> None:
        raise UserError("stopped")

    monkeypatch.setattr("deepdelta.training.trainer.Trainer.run_steps", stop)
    with pytest.raises(UserError, match="stopped"):
        quietly(config(source, seed=5), tmp_path / "new", init_from=finished)
    new, old = tensors(tmp_path / "new"), tensors(finished)
    assert new.keys() == {name for name in old if name.startswith("model.")}
    assert all(new[name].equal(old[name]) for name in new)


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_start_that_was_cut_short_is_no_run(
    finished: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Killed after the first checkpoint, after the tokenizer, or after environment.json: config.json comes last."""
    run = tmp_path / "run"
    run.mkdir()
    other = load(finished).model  # whatever its weights, the checkpoint is that of a start: it is at step 0
    RunDirectory(run).save_checkpoint(other, build_optimizer(other, config(source)), step=0, seconds=0.0)
    for name in ["tokenizer.json", "environment.json"][: left - 1]:
        shutil.copy(finished / name, run / name)
    assert not RunDirectory(run).started
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.json"):
        load(run)
    quietly(config(source, seed=1), run)
    quietly(config(source, seed=1), tmp_path / "clean")
    assert_same_run(run, tmp_path / "clean")


def test_a_start_anew_leaves_nothing_of_the_one_before(finished: Path, copy: Path, tmp_path: Path) -> None:
    """A tokenizer that stayed would be taken for that of a corpus of bare ids."""
    ids = tmp_path / "ids.bin"
    torch.arange(4000, dtype=torch.int32).remainder(50).to(torch.uint16).numpy().tofile(ids)
    for name in ("config.json", "metrics.jsonl"):
        (copy / name).unlink()
    run, (model, _) = RunDirectory(copy), load(finished)
    run.save_checkpoint(model, build_optimizer(model, config(ids)), step=0, seconds=0.0)
    quietly(config(ids, steps=3, data={"bin_vocab_size": 50}), copy)
    assert load(copy).tokenizer is None
    assert [row["step"] for row in rows(copy)] == [1, 2, 3, 3, 3]
    assert set(contents(copy)) == {"config.json", "environment.json", "metrics.jsonl", "checkpoint.safetensors"}


def test_a_missing_compiler(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepdelta.training.loop.compiler_problem", lambda device: f"{device} needs a C++ compiler")
    refused(r"cpu needs a C\+\+ compiler; or train with compile=False", config(source, compile=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_path_that_cannot_be_a_run_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be a folder for results: .*Give another run directory"):
            quietly(config(source), path)


def test_damaged_configuration_and_environment(copy: Path, source: Path) -> None:
    whole = (copy / "environment.json").read_text()
    (copy / "environment.json").write_text('{"versions": ')
    refused("environment.json must hold a JSON object, but is damaged", config(source, steps=22), copy)
    (copy / "environment.json").write_text(whole)
    (copy / "config.json").write_text('{"steps": 5, "modle": {}}')
    with pytest.raises(UserError, match=r"config\.json: unknown key 'modle'; did you mean 'model'"):
        load(copy)

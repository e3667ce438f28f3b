"""Several processes train what one trains: losses, norms and weights within rounding, checkpoints for any number."""

import errno
import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deepdelta
from deepdelta import GPT, GPTConfig, load
from deepdelta.exporting import export
from deepdelta.models import language_model
from deepdelta.training import RunDirectory, Trained, parts, ranks, train
from deepdelta.training.checkpoints import BEST
from deepdelta.training.config import run_settings
from deepdelta.training.parallel import recompute
from deepdelta.training.parts import Piece
from deepdelta.training.ranks import Ranks
from deepdelta.training.trainer import Trainer
from rank_runs import Case, assert_close, by_ranks, halves, host, meeting, run_cases, small, text_and_documents
from tiny_runs import rows

NAN_STEPS = (2, 4)


def variants(source: Path) -> dict[str, dict[str, Any]]:
    """The ways of sharing, with what each has to get right."""
    documents = {"source": str(source.parent / "documents"), "windows": "documents"}
    return {
        "ddp": small(source, average="ema", keep_best=True),
        "ddp-documents": small(source, "paper-scalar", data=documents, accumulate=3),
        "ddp-fused": small(source, "paper-tc", backend="fused"),
        "fsdp": small(source, parallel="fsdp", average="last", average_steps=2, keep_best=True),
        "fsdp-fused": small(source, "code-cc", parallel="fsdp", backend="fused", recompute=True),
        "fsdp-write-only": small(source, "paper-tc", residual={"rule": "write_only"}, parallel="fsdp"),
        "tensor": small(source, parallel="tensor", average="ema", keep_best=True),
        "tensor-fused": small(source, "paper-tc", parallel="tensor", backend="fused", recompute=True),
        "skips": small(source, parallel="fsdp"),
    }


@contextmanager
def ruined(rank: int, steps: tuple[int, ...]) -> Iterator[None]:
    """The loss of one rank is NaN in some steps."""
    real = Trainer._losses

    def losses(self: Trainer, forward: nn.Module, step: int) -> Iterator[Tensor]:
        for loss in real(self, forward, step):
            yield loss * math.nan if self.ranks.rank == rank and step + 1 in steps and loss.requires_grad else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_losses", losses)
        yield


@contextmanager
def full(rank: int, step: int) -> Iterator[None]:
    """The disk of one rank has no space for its part of a checkpoint."""
    real = parts._written

    def written(file: Path, pieces: dict[str, Piece], at: int, ranks: Ranks) -> tuple[str, str] | None:
        with pytest.MonkeyPatch.context() as patch:
            if (ranks.rank, at) == (rank, step):
                patch.setattr(os, "replace", fail)
            return real(file, pieces, at, ranks)

    def fail(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_written", written)
        yield


def _two(folder: Path, cases: dict[str, dict[str, Any]], others: dict[str, list[Case]]) -> dict[str, str]:
    """What each of two ranks does in the short form, and what it is told; the second dies in the end."""
    told = run_cases(folder, [(name, plain, {}) for name, plain in cases.items() if name != "skips"] + others["sound"])
    with ruined(1, NAN_STEPS):
        told |= run_cases(folder, [("skips", cases["skips"], {})])
    with ruined(1, (3, 4, 5)):
        told |= run_cases(folder, others["diverges"])
    with full(1, 6):
        told |= run_cases(folder, others["full"])
    told |= run_cases(folder, others["damaged"][:1])
    if os.environ["RANK"] == "0":
        part = folder / "damaged" / "parts" / "checkpoint-000000000003-1-of-2.safetensors"
        part.write_bytes(part.read_bytes()[:-1])
    lines: list[str] = []
    train(run_settings(others["damaged"][1][1], where="damaged"), folder / "damaged", say=lines.append)
    if os.environ["RANK"] == "0":
        (folder / "said.json").write_text(json.dumps(lines))
    seed = int(os.environ["RANK"])
    told |= run_cases(folder, [(name, plain | {"seed": seed}, options) for name, plain, options in others["differ"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_steps", lambda self: Trained(0, False, None))
        told |= run_cases(folder, others["start"])
    (folder / f"told-{seed}.json").write_text(json.dumps(told))
    real = Trainer._one_step

    def one_step(self: Trainer) -> None:
        if self.step == 4 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one_step", one_step)
        patch.setattr(ranks, "ANSWER", 2.0)
        return run_cases(folder, others["dies"])


class Short(NamedTuple):
    """What two ranks left."""

    expected: Path
    """Where one process has trained the same."""
    found: Path
    told: list[dict[str, str]]
    """Of each rank, by runs that failed."""
    ends: list[Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_and_documents(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def short(source: Path, tmp_path_factory: pytest.TempPathFactory, unchecked_file: None) -> Short:
    expected, found = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    cases = variants(source)
    for name, plain in cases.items():
        with ruined(0, NAN_STEPS if name == "skips" else ()):
            assert not run_cases(expected, [(name, plain | {"recompute": False}, {})])
    (begun, gone_on), (left, _) = halves("from-one", cases["fsdp"]), halves("from-two", cases["ddp"])
    (begun_split, gone_on_split), (left_split, _) = (
        halves(f"{name}-split", cases["tensor"]) for name in ("from-one", "from-two")
    )
    assert not run_cases(found, [begun, begun_split])
    (found / "occupied").mkdir()
    (found / "occupied" / "metrics.jsonl").write_text("of somebody else")
    exact = (gone_on[0], gone_on[1], {})
    wrong: list[Case] = [
        ("divides", cases["ddp"] | {"batch_size": 3}, {}),
        ("occupied", cases["ddp"], {}),
        ("rival", small(source, model={"rival": "identity-hyper"}, parallel="fsdp"), {}),
        ("heads", small(source, model={"heads": 1}, parallel="tensor"), {}),
        ("hidden", small(source, model={"mlp_dim": 21}, parallel="tensor"), {}),
        ("split-rival", small(source, model={"rival": "gru"}, parallel="tensor"), {}),
        ("split-compiled", cases["tensor"] | {"compile": True}, {}),
        ("from-one", *exact[1:]),
    ]
    others: dict[str, list[Case]] = {
        "sound": [*wrong, gone_on, left, gone_on_split, left_split],
        "diverges": [("diverges", cases["fsdp"], {})],
        "full": [("full", cases["fsdp"] | {"keep_best": False}, {})],
        "damaged": [("damaged", cases["fsdp"] | {"keep_last": 2, "steps": steps}, {}) for steps in (3, 6)],
        "differ": [("differ", cases["ddp"], {})],
        "start": [("start", cases["fsdp"], {})],
        "dies": [("dies", cases["fsdp"], {})],
    }
    ends = by_ranks(2, found, _two, cases, others)
    told = [json.loads((found / f"told-{rank}.json").read_text()) for rank in range(2)]
    return Short(expected, found, told, ends)


@pytest.mark.parametrize(
    "name", ["ddp", "ddp-documents", "ddp-fused", "fsdp", "fsdp-fused", "fsdp-write-only", "tensor", "tensor-fused"]
)
def test_two_train_as_one(short: Short, name: str) -> None:
    assert name not in short.told[0] | short.told[1]
    assert_close(short.found / name, short.expected / name)
    files = {path.name for path in (short.expected / name).iterdir()}
    shared = {"parts"} if not name.startswith("ddp") else set()
    assert {path.name for path in (short.found / name).iterdir()} == files | shared


def test_each_process_writes_its_part(short: Short, tmp_path: Path) -> None:
    """Of FSDP half of every matrix each, and no file is a pickle; read whole by whoever reads the run."""
    run = short.found / "fsdp"
    there = {file.name for file in (run / "parts").iterdir()}
    assert there == {
        f"{name}-{step:012d}-{rank}-of-2.safetensors"
        for name, step in (("checkpoint", 6), ("best", RunDirectory(run).checkpoint(BEST).step), ("average", 6))
        for rank in range(2)
    }
    weights = RunDirectory(run).checkpoint().weights
    for rank in range(2):
        halves = load_file(run / "parts" / f"checkpoint-000000000006-{rank}-of-2.safetensors")
        matrix = halves["model.layers.0.mlp.branch.up.weight"]
        assert matrix.equal(weights["layers.0.mlp.branch.up.weight"].chunk(2)[rank])
    assert {file.suffix for file in run.rglob("*") if file.is_file()} == {".safetensors", ".json", ".jsonl", ""}
    export(run, "safetensors", tmp_path / "one")
    exported = load_file(tmp_path / "one" / "model.safetensors")
    assert exported.keys() == weights.keys() and all(exported[name].equal(weights[name]) for name in weights)
    assert not load(run, BEST).model.training


def test_a_damaged_part_is_named_and_the_checkpoint_before_it_used(short: Short) -> None:
    said = json.loads((short.found / "said.json").read_text())
    (line,) = [line for line in said if "Going on from" in line]
    assert "parts/checkpoint-000000000003-1-of-2.safetensors is truncated or damaged" in line
    assert line.endswith("step-000000000000.safetensors.")
    assert_close(short.found / "damaged", short.expected / "fsdp")


def test_a_process_without_space_stops_all_at_the_last_good_checkpoint(short: Short) -> None:
    said = sorted(told["full"] for told in short.told)
    assert [line.partition(":")[0] for line in said] == ["Told", "UserError"]
    part = "parts/checkpoint-000000000006-1-of-2.safetensors cannot be written: No space left on device."
    assert part in said[1] and "The last good checkpoint is at step 3" in said[1]
    assert RunDirectory(short.found / "full").step() == 3


def test_all_skip_where_one_is_not_finite(short: Short) -> None:
    assert [row["step"] for row in rows(short.found / "skips") if "skipped" in row] == [*NAN_STEPS]
    assert_close(short.found / "skips", short.expected / "skips")


def test_weights_start_the_same_bit_for_bit(short: Short, source: Path) -> None:
    config = RunDirectory(short.found / "start").config()
    saved = RunDirectory(short.found / "start").checkpoint()
    assert saved.step == 0
    for name, tensor in language_model(config.model, config.seed).state_dict().items():
        assert tensor.equal(saved.weights[name]), name


def test_what_one_began_two_end(short: Short) -> None:
    assert_close(short.found / "from-one", short.expected / "fsdp")
    assert_close(short.found / "from-one-split", short.expected / "tensor")


def test_what_two_began_one_ends(short: Short, source: Path) -> None:
    for run, name in (("from-two", "ddp"), ("from-two-split", "tensor")):
        _, case = halves(run, variants(source)[name])
        assert RunDirectory(short.found / run).step() == 3
        assert not run_cases(short.found, [case])
        assert_close(short.found / run, short.expected / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divides", "batch_size must be a multiple of the number of processes, got batch_size=3 and 2 processes"),
        ("occupied", "holds metrics.jsonl, which a run would overwrite"),
        ("rival", "parallel='fsdp' shards a GPT's layers; the rival 'identity-hyper' takes 'ddp'"),
        ("heads", "parallel='tensor' needs model.heads to be a multiple of the number of processes, got 1 and 2"),
        ("hidden", "parallel='tensor' needs model.mlp_dim to be a multiple of the number of processes, got 21 and 2"),
        ("split-rival", "parallel='tensor' shards a GPT's layers; the rival 'gru' takes 'ddp'"),
        ("split-compiled", "parallel='tensor' does not go with compile"),
        ("differ", "rank 1 differs from rank 0 here: seed: 1 there, 0 here."),
        ("diverges", "3 such steps in a row (every layer's output is finite): training diverged."),
    ],
)
def test_refused_once(short: Short, name: str, message: str) -> None:
    """One rank says it, the other ends without a line; nothing is left."""
    said = sorted(told[name] for told in short.told)
    assert [line.partition(":")[0] for line in said] == ["Told", "UserError"] and message in said[1]
    left = {path.name for path in (short.found / name).iterdir()} if (short.found / name).exists() else set()
    if name == "diverges":
        assert RunDirectory(short.found / name).step() == 3  # a step that was skipped leaves good weights
    else:
        assert left == ({"metrics.jsonl"} if name == "occupied" else set())


def test_another_number_of_ranks_is_another_environment(short: Short) -> None:
    """Refused without `inexact_resume`, since the last bits differ; the run then went on with it."""
    message = "was started in another environment (parallel: 'none' there, 'fsdp' here; processes: 1 there, 2 here)"
    assert message in max(told["from-one"] for told in short.told)


def test_a_rank_that_dies_is_named_and_the_run_goes_on(short: Short, source: Path) -> None:
    said, code = short.ends
    assert code == -signal.SIGKILL
    assert said["dies"].startswith("UserError: rank 1 of 2 ended without a word: killed, stuck, or")
    assert RunDirectory(short.found / "dies").step() == 3
    assert not run_cases(short.found, [("dies", variants(source)["fsdp"], {"inexact_resume": True})])
    assert_close(short.found / "dies", short.expected / "fsdp")


def test_one_rank_alone(short: Short, source: Path, tmp_path: Path) -> None:
    store = host()
    with meeting(0, 1, store.port):
        assert not run_cases(tmp_path, [("fsdp", variants(source)["fsdp"], {})])
    assert_close(tmp_path / "fsdp", short.expected / "fsdp")
    assert RunDirectory(tmp_path / "fsdp").environment()["parallel"] == "fsdp"


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e18])
def test_no_time_to_wait(source: Path, tmp_path: Path, timeout: float) -> None:
    (said,) = run_cases(tmp_path, [("run", variants(source)["ddp"], {"timeout": timeout})]).values()
    assert (
        said.startswith("UserError: timeout must lie in (0, 1,000,000] seconds, got")
        and not (tmp_path / "run").exists()
    )


def test_a_rank_that_is_no_number(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "x")
    (said,) = run_cases(tmp_path, [("run", variants(source)["ddp"], {})]).values()
    assert "RANK must be a whole number, as torchrun sets it, got 'x'" in said and not (tmp_path / "run").exists()


def test_ranks_that_do_not_meet(source: Path, tmp_path: Path) -> None:
    store = host()
    with meeting(0, 2, store.port):
        (said,) = run_cases(tmp_path, [("run", variants(source)["ddp"], {"timeout": 1.0})]).values()
    assert "the 2 processes of this run have not met at 127.0.0.1:" in said and "within 1 s" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["ddl", "code-cc"])
def test_recompute_keeps_less(preset: str, unchecked: None) -> None:
    """Of a layer its input alone, and the same gradients come of it."""
    config = GPTConfig(vocab_size=12, dim=12, heads=2, layers=3, context=8, residual=deepdelta.PRESETS[preset])
    ids = torch.randint(12, (4, 9), generator=torch.Generator().manual_seed(0))
    models, kept = (GPT(config), GPT(config)), []
    recompute(models[1])
    for model in models:
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)

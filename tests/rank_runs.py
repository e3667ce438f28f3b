"""Runs by several processes that start and meet as torchrun has it, on the CPU by gloo; as few groups as possible: each
process costs seconds to start."""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepdelta.config import merged
from deepdelta.errors import UserError
from deepdelta.training import train
from deepdelta.training.config import run_settings
from tiny_runs import rows, settings, tensors, text_file

Case = tuple[str, dict[str, Any], dict[str, Any]]
"""The name of a run directory, its settings as plain data, options of `train`."""


SMALL: dict[str, Any] = {
    "model": {"context": 8, "layers": 2, "heads": 4, "dim": 8, "mlp_dim": 20, "embedding_std": 0.1},
    "batch_size": 4,
    "accumulate": 2,
    "steps": 6,
    "lr": 5e-4,
    "schedule": "constant",
    "eval_every": 4,
    "eval_tokens": 40,
    "final_eval_tokens": 100,
    "checkpoint_every": 3,
}


def small(source: Path, preset: str = "ddl", **changes: Any) -> dict[str, Any]:
    """A short run as plain data; `residual` goes over the preset."""
    plain = merged(SMALL, {"model": {"residual": {"preset": preset} | changes.pop("residual", {})}})
    return settings(source, **merged(plain, changes))


def text_and_documents(folder: Path) -> Path:
    """A text, and in `documents` beside it the same in pieces."""
    (folder / "documents").mkdir()
    text = text_file(folder / "text.txt").read_text()
    for number in range(0, len(text), 37):
        (folder / "documents" / f"{number}.txt").write_text(text[number : number + 5 + number % 31] + str(number))
    return folder / "text.txt"


@contextmanager
def meeting(rank: int, size: int, port: int) -> Iterator[None]:
    """The environment that torchrun gives: the store is its own, not the first rank's."""
    with pytest.MonkeyPatch.context() as patch:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in (given | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
            patch.setenv(name, str(value))
        yield


def host() -> Any:
    """A store at a free port; it lives as long as the object does."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def run_cases(folder: Path, cases: list[Case]) -> dict[str, str]:
    """Train them one after the other, in this process's group or alone; what users are told of those that fail."""
    told = {}
    for name, plain, options in cases:
        try:
            train(run_settings(plain, where=name), folder / name, say=lambda line: None, **options)
        except UserError as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def _work(work: Callable[..., Any], rank: int, size: int, port: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with meeting(rank, size, port):
        (folder / f"rank-{rank}.json").write_text(json.dumps(work(folder, *arguments)))


def by_ranks(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(folder, *arguments)` gives on each rank, plain data; the exit code of one that died."""
    folder.mkdir(exist_ok=True)
    store, spawn = host(), multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        processes = [
            spawn.Process(target=_work, args=(work, rank, size, store.port, folder, arguments)) for rank in range(size)
        ]
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    files = [folder / f"rank-{rank}.json" for rank in range(size)]
    return [
        json.loads(file.read_text()) if process.exitcode == 0 else process.exitcode
        for file, process in zip(files, processes, strict=True)
    ]


def assert_close(run: Path, expected: Path) -> None:
    """Losses, norms and weights within rounding; Adam's first steps divide by gradients that may be next to nothing, so
    that rounding moves such a weight by the rate, which is small here for that."""
    # A run that was extended has been validated where it had ended before.
    made = [row for row in rows(run) if "validation_loss" not in row or row["step"] != 3]
    for row, other in zip(made, rows(expected), strict=True):
        norms = [one.pop("gradient_norm", 0.0) for one in (row, other)]
        assert norms[0] == pytest.approx(norms[1], rel=3e-4), f"{row} instead of {other}"
        assert row == pytest.approx(other, rel=2e-5), f"{row} instead of {other}"
    ours, theirs = tensors(run), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def halves(name: str, plain: dict[str, Any]) -> tuple[Case, Case]:
    """A run up to its third step, and to its end by other ranks."""
    return (name, plain | {"steps": 3}, {}), (name, plain, {"inexact_resume": True})

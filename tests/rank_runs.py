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

from deepdelta.errors import UserError
from deepdelta.training import train
from deepdelta.training.config import run_settings

Case = tuple[str, dict[str, Any], dict[str, Any]]
"""The name of a run directory, its settings as plain data, options of `train`."""


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
    for name, settings, options in cases:
        try:
            train(run_settings(settings, where=name), folder / name, say=lambda line: None, **options)
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

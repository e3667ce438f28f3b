"""Checkpoints in parts: assembled from any number of processes for any number, committed last, pruned, and named where
one is damaged. The processes are threads here; tests/test_ranks.py has real ones."""

import errno
import json
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from damage import cut, flip
from deepdelta import UserError
from deepdelta.training import RunDirectory, parts
from deepdelta.training.checkpoints import last_good, read_checkpoint
from deepdelta.training.parts import Piece, Snapshot, Stored
from deepdelta.training.ranks import Ranks
from deepdelta.training.trainer import Trainer
from tiny_runs import assert_same_run, config, quietly, text_file

pytestmark = pytest.mark.usefixtures("unchecked_file")

Given = dict[str, tuple[Tensor, int | None]]
"""Tensors, and along which axis the processes share each; None: the first has it."""


def tensors_of(seed: int) -> Given:
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.matrix": (torch.randn(5, 3, generator=draw), 0),
        "model.wide": (torch.randn(2, 7, generator=draw), 1),
        "model.tiny": (torch.randn(1, generator=draw), 0),
        "model.scalar": (torch.randn((), generator=draw), None),
        "optimizer.matrix.step": (torch.tensor(3.0), None),
        "average.short": (torch.randn(4, generator=draw).bfloat16(), 0),
    }


def held(given: Given, rank: int, size: int) -> Snapshot:
    whole, pieces = {}, {}
    for name, (tensor, axis) in given.items():
        if axis is None:
            whole |= {name: tensor} if rank == 0 else {}
            continue
        mine = tensor.chunk(size, axis)[rank : rank + 1]
        if mine:
            offset = [0] * tensor.ndim
            offset[axis] = rank * -(-tensor.shape[axis] // size)
            pieces[name] = Piece(mine[0], tuple(offset), tuple(tensor.shape))
    return Snapshot(whole, pieces, True)


def write(
    run: Path, given: Given, size: int, step: int, name: str = "checkpoint.safetensors", last: int = 1
) -> list[str | None]:
    """Write a checkpoint by so many ranks; what each of them is told."""
    store = dist.HashStore()

    def one(rank: int) -> str | None:
        try:
            ranks = Ranks(rank, size, store, timeout=5.0)
            RunDirectory(run).write_snapshot(held(given, rank, size), step, 1.5, name, last, ranks, f"saved/{step}")
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))


def by_hand(run: Path, name: str = "checkpoint.safetensors") -> dict[str, Tensor]:
    """The tensors of a checkpoint, put together from what the library safetensors finds in its files."""
    with safe_open(run / name, framework="pt") as first:
        found = {key: first.get_tensor(key) for key in first.keys()}
        index = json.loads(first.metadata()["parts"])
    for part in index:
        with safe_open(run / "parts" / part, framework="pt") as opened:
            for key, (offset, shape) in json.loads(opened.metadata()["pieces"]).items():
                values = opened.get_tensor(key)
                whole = found.setdefault(key, torch.full(shape, math.nan, dtype=values.dtype))
                place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                assert whole[place].isnan().all()
                whole[place] = values
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_written_by_any_number(tmp_path: Path, size: int) -> None:
    given = tensors_of(size)
    assert write(tmp_path, given, size, 7) == [None] * size
    checkpoint, hand = read_checkpoint(tmp_path / "checkpoint.safetensors"), by_hand(tmp_path)
    assert (checkpoint.step, checkpoint.seconds) == (7, 1.5)
    for name, (tensor, _) in given.items():
        kind, _, key = name.partition(".")
        found = {"model": checkpoint.weights, "optimizer": checkpoint.optimizer, "average": checkpoint.average}[kind]
        for one in (found[key], hand[name]):
            assert one.equal(tensor) and one.dtype == tensor.dtype, name
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors"}, "nothing else, no pickle"


@settings(max_examples=30)
@given(data=st.data())
def test_any_block_of_what_any_number_wrote(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("run")
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    tensor, axis = torch.randn(shape), data.draw(st.integers(0, len(shape) - 1))
    write(run, {"model.a": (tensor, axis)}, data.draw(st.integers(1, 5)), 1)
    offset = [data.draw(st.integers(0, length)) for length in shape]
    size = [data.draw(st.integers(0, length - first)) for length, first in zip(shape, offset, strict=True)]
    block = tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))
    assert Stored(run / "checkpoint.safetensors").block("model.a", offset, size).equal(tensor[block])


def other(file: Path) -> None:
    """Whole, but of another step."""
    file.write_bytes(file.with_name(file.name.replace("000000000002", "000000000001")).read_bytes())


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, other])
@pytest.mark.parametrize("readers", [1, 3])
def test_a_part_that_is_damaged_is_named_and_the_one_before_used(
    tmp_path: Path, damage: Callable[[Path], None], readers: int
) -> None:
    for step in (1, 2):
        write(tmp_path, tensors_of(step), 3, step, last=2)
    part = tmp_path / "parts" / "checkpoint-000000000002-1-of-3.safetensors"
    damage(part)
    with pytest.raises(
        UserError, match=rf"{part.name} (is|has been|holds).*; restore a copy, or go on from the one before it"
    ):
        read_checkpoint(tmp_path / "checkpoint.safetensors")
    store, said = dist.HashStore(), list[str]()

    def read(rank: int) -> Tensor:
        ranks = Ranks(rank, readers, store, timeout=5.0)
        stored = last_good(tmp_path, said.append if rank == 0 else lambda line: None, ranks, readers)
        assert stored is not None and stored.step == 1
        return stored.whole("model.wide")

    with ThreadPoolExecutor(readers) as threads:
        assert all(found.equal(tensors_of(1)["model.wide"][0]) for found in threads.map(read, range(readers)))
    (line,) = said
    assert part.name in line and line.endswith("step-000000000001.safetensors.")
    assert read_checkpoint(tmp_path / "checkpoint.safetensors").step == 1


def test_only_parts_of_what_is_kept_stay(tmp_path: Path) -> None:
    def names() -> set[str]:
        return {file.name[: -len("-0-of-2.safetensors")] for file in (tmp_path / "parts").iterdir()}

    write(tmp_path, tensors_of(0), 2, 1, "best.safetensors")
    for step in range(2, 6):
        write(tmp_path, tensors_of(step), 2, step, last=2)
    assert names() == {"best-000000000001", "checkpoint-000000000004", "checkpoint-000000000005"}
    (tmp_path / "parts" / "notes.safetensors").write_bytes(b"of the user")
    write(tmp_path, tensors_of(6), 4, 6)
    assert {name for name in names() if "-0-of-4" not in name} >= {"best-000000000001"}
    RunDirectory(tmp_path).save_checkpoint(torch.nn.Linear(2, 2), None, 7, 0.0)
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {
        "notes.safetensors",
        *(f"best-000000000001-{rank}-of-2.safetensors" for rank in range(2)),
    }
    assert read_checkpoint(tmp_path / "best.safetensors").weights["matrix"].equal(tensors_of(0)["model.matrix"][0])
    (tmp_path / "parts" / "notes.safetensors").unlink()
    write(tmp_path, {"model.a": (torch.ones(1), None)}, 2, 8, "best.safetensors")
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_write_leaves_the_checkpoint_before(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, tensors_of(1), 2, 1)
    real = parts._written

    def written(file: Path, pieces: dict[str, Piece], step: int, ranks: Ranks) -> tuple[str, str] | None:
        if ranks.rank == rank:
            raise UserError(os.strerror(errno.ENOSPC))
        return real(file, pieces, step, ranks)

    monkeypatch.setattr(parts, "_written", written)
    told = write(tmp_path, tensors_of(2), 2, 2)
    assert told[0] == os.strerror(errno.ENOSPC) and told[1] == (told[0] if rank else None)
    checkpoint = read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert checkpoint.step == 1 and checkpoint.weights["matrix"].equal(tensors_of(1)["model.matrix"][0])
    monkeypatch.undo()
    write(tmp_path, tensors_of(3), 2, 3)
    assert {file.name.split("-")[1] for file in (tmp_path / "parts").iterdir()} == {"000000000003"}


def test_a_start_that_was_cut_short_before_its_checkpoint_is_cleared(tmp_path: Path) -> None:
    run, mine = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "mine")
    for folder, step in ((run, 0), (mine, 3)):
        write(folder.path, tensors_of(0), 2, step)
        (folder.path / "checkpoint.safetensors").unlink()
    run.clear()
    assert not list(run.path.iterdir())
    with pytest.raises(UserError, match=r"mine holds checkpoint-0+3-0-of-2\.safetensors, .* would overwrite"):
        mine.clear()
    assert len(list((mine.path / "parts").iterdir())) == 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


def test_steps_go_on_while_a_checkpoint_is_written(source: Path, tmp_path: Path) -> None:
    """The one of step 4 is written no sooner than step 6 is made, and holds what there was at step 4."""
    real, one_step, gone_on = RunDirectory.write_snapshot, Trainer._one_step, threading.Event()

    def write_snapshot(self: RunDirectory, held: Snapshot, step: int, *rest: Any) -> None:
        assert step != 4 or gone_on.wait(60), "the steps wait for the disk"
        real(self, held, step, *rest)

    def step(self: Trainer) -> None:
        one_step(self)
        if self.step == 6:
            gone_on.set()

    plain = config(source, checkpoint_every=4, keep_last=9, average="ema")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "write_snapshot", write_snapshot)
        patch.setattr(Trainer, "_one_step", step)
        quietly(plain, tmp_path / "beside")
    quietly(replace(plain, async_save=False), tmp_path / "waiting")
    assert_same_run(tmp_path / "beside", tmp_path / "waiting")
    names = sorted(str(file.relative_to(tmp_path / "beside")) for file in (tmp_path / "beside").rglob("*.safetensors"))
    assert len(names) == 8
    for name in names:
        there, here = (read_checkpoint(tmp_path / run / name) for run in ("beside", "waiting"))
        assert there.step == here.step
        for kind in ("weights", "optimizer", "average"):
            ours, theirs = getattr(there, kind), getattr(here, kind)
            assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours), (name, kind)

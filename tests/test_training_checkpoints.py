"""Several checkpoints: the last N and the best are kept, and what is damaged is passed over for the one before it."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from damage import cut, flip
from deepdelta import UserError, load, train
from deepdelta.cli import main
from deepdelta.config import to_plain
from deepdelta.files import write_json
from deepdelta.training import RunDirectory, parts
from deepdelta.training.checkpoints import earlier, read_checkpoint
from tiny_runs import ENVIRONMENT, assert_same_run, command, config, quietly, rows, text_file

pytestmark = pytest.mark.usefixtures("unchecked_file")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 20 steps, checkpoints at 0, 4, 8, ..., 20, the last three kept, and the best."""
    run = tmp_path_factory.mktemp("finished") / "run"
    quietly(kept(source), run)
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """With the last checkpoint under two names of one file, as it was."""
    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    earlier(run)[0].unlink()
    earlier(finished)  # untouched
    (run / "checkpoints" / "step-000000000020.safetensors").hardlink_to(run / "checkpoint.safetensors")
    return run


def kept(source: Path, **changes: Any) -> Any:
    return config(source, **{"checkpoint_every": 4, "keep_last": 3, "keep_best": True, **changes})


def steps(run: Path) -> list[int]:
    return [read_checkpoint(file).step for file in earlier(run)]


def test_the_last_and_the_best_are_kept(finished: Path, source: Path, tmp_path: Path) -> None:
    assert steps(finished) == [20, 16, 12] and os.path.samefile(
        earlier(finished)[0], finished / "checkpoint.safetensors"
    )
    validations = {row["validation_loss"]: row["step"] for row in rows(finished) if row.get("final") is False}
    best = RunDirectory(finished).checkpoint("best.safetensors")
    assert best.step == validations[min(validations)]
    assert load(finished, "best.safetensors").model.state_dict().keys() == load(finished).model.state_dict().keys()
    quietly(config(source), tmp_path / "plain")
    assert_same_run(finished, tmp_path / "plain")  # what is kept changes no number
    assert {path.name for path in finished.iterdir()} == {path.name for path in (tmp_path / "plain").iterdir()} | {
        "checkpoints",
        "best.safetensors",
    }
    # Fewer may be wanted later.
    run = Path(shutil.copytree(finished, tmp_path / "fewer"))
    quietly(kept(source, steps=21, keep_last=1), run)
    assert not (run / "checkpoints").exists() and RunDirectory(run).step() == 21
    ended = Path(shutil.copytree(finished, tmp_path / "ended"))
    quietly(kept(source, keep_last=1), ended)  # no step is left to be made
    assert not (ended / "checkpoints").exists() and RunDirectory(ended).step() == 20


def test_a_kill_between_a_checkpoint_and_its_name_among_those_before_it(source: Path, tmp_path: Path) -> None:
    """The same are kept as if it had not been."""
    run = tmp_path / "run"
    quietly(kept(source, steps=12), run)
    earlier(run)[0].unlink()
    assert (RunDirectory(run).step(), steps(run)) == (12, [8, 4])
    quietly(kept(source), run)
    assert steps(run) == [20, 16, 12]


def test_the_best_is_evaluated_on_request(finished: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for name in ("checkpoint.safetensors", "best.safetensors", "checkpoints/step-000000000012.safetensors"):
        main(["evaluate", str(finished), "--device", "cpu", "--checkpoint", name])
        said.append(capsys.readouterr().out.splitlines()[0])
    assert said[2] != said[0]
    with pytest.raises(UserError, match=r"holds no average\.safetensors"):
        load(finished, "average.safetensors")


def gone(file: Path) -> None:
    """With its second name."""
    second = file.parent / "checkpoints" / "step-000000000020.safetensors"
    file.unlink()
    if second.exists():
        second.unlink()


@pytest.mark.parametrize("damage", [flip, cut, gone])
@pytest.mark.parametrize("how_many", [1, 2])
def test_what_is_damaged_is_named_and_the_one_before_it_used(
    copy: Path, source: Path, tmp_path: Path, damage: Callable[[Path], None], how_many: int
) -> None:
    damage(copy / "checkpoint.safetensors")
    if how_many == 2:
        damage(copy / "checkpoints" / "step-000000000016.safetensors")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors"):
        load(copy)  # nothing but training passes over it
    lines: list[str] = []
    train(kept(source, steps=24), copy, say=lines.append)
    step = 16 if how_many == 1 else 12
    (said,) = [line for line in lines if "Going on from" in line]
    assert f"{copy / 'checkpoint.safetensors'}" in said or "holds no checkpoint.safetensors" in said
    assert said.endswith(f"{copy / 'checkpoints' / f'step-{step:012d}.safetensors'}.")
    assert f"Continuing {copy} at step {step} of 24." in lines
    assert steps(copy) == [24, 20, 16] and RunDirectory(copy).step() == 24


def test_from_the_one_before_it_to_the_same_bits(finished: Path, copy: Path, source: Path) -> None:
    flip(copy / "checkpoint.safetensors")
    quietly(kept(source), copy)
    assert_same_run(copy, finished)
    assert steps(copy) == [20, 16, 12]
    a, b = (one / "best.safetensors" for one in (copy, finished))
    assert read_checkpoint(a).step == read_checkpoint(b).step


def test_where_none_is_good_the_last_is_named(copy: Path, source: Path) -> None:
    for file in (copy / "checkpoint.safetensors", *earlier(copy)[1:]):
        flip(file)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(UserError, match=r"copy/checkpoint\.safetensors is damaged"):
        quietly(kept(source), copy)
    assert before == {file: file.read_bytes() for file in copy.rglob("*") if file.is_file() and file.name != ".lock"}


def test_checkpoints_of_others_are_left_alone(source: Path, tmp_path: Path) -> None:
    for name in ("best.safetensors", "checkpoints/step-000000000007.safetensors"):
        run = tmp_path / name.replace("/", "-")
        (run / name).parent.mkdir(parents=True)
        (run / name).write_bytes(b"of the user")
        with pytest.raises(UserError, match=f"holds {Path(name).name}, which a run would overwrite"):
            quietly(kept(source), run)
        assert (run / name).read_bytes() == b"of the user"


FAULTS = {
    "no space": (errno.ENOSPC, "No space left on device"),
    "quota": (errno.EDQUOT, "Disk quota exceeded"),
    "read-only": (errno.EROFS, "Read-only file system"),
    "input/output": (errno.EIO, "Input/output error"),
}


PLACES = ["deepdelta.tensors.save_file", "os.fsync", "os.replace", "os.mkdir", "link"]


@pytest.mark.parametrize(
    ("place", "fault"),
    [*((place, "no space") for place in PLACES), *(("os.replace", fault) for fault in [*FAULTS][1:])],
)
def test_a_faulty_file_layer_leaves_the_last_good_checkpoint(
    finished: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, fault: str
) -> None:
    """From the moment that the checkpoint of step 8 is written on, each call of one kind fails."""
    run, (number, words) = tmp_path / "run", FAULTS[fault]
    real = parts.write_checkpoint

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def write(file: Path, tensors: Any, step: int, *rest: Any) -> None:
        if step == 8 and file.name == "checkpoint.safetensors":
            if place == "link":  # no link, and no copy either
                monkeypatch.setattr(Path, "hardlink_to", fail)
                monkeypatch.setattr(shutil, "copyfile", fail)
            else:
                monkeypatch.setattr(place, fail)
        real(file, tensors, step, *rest)

    monkeypatch.setattr("deepdelta.training.rundir.write_checkpoint", write)
    with pytest.raises(UserError, match=rf"{words}.* The last good checkpoint is at step 4 in .* the same command"):
        quietly(kept(source), run)
    monkeypatch.undo()
    good = 8 if place == "link" else 4
    assert RunDirectory(run).step() == good and all(read_checkpoint(file).step <= 8 for file in earlier(run))
    quietly(kept(source), run)
    assert_same_run(run, finished)
    assert {path.name for path in run.iterdir()} == {path.name for path in finished.iterdir()}


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare of util-linux")
def test_a_disk_that_fills_up(source: Path, tmp_path: Path) -> None:
    """A small tmpfs, on which the checkpoints that are kept leave no room for the next."""
    write_json(tmp_path / "a.json", to_plain(kept(source, keep_last=1000, checkpoint_every=1)))
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=700k tmpfs disk || exit 77; shift; "$@"; code=$?; cp -a disk/run kept; exit $code'
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", "sh"]
    words += command("train", "disk/run", "--config", tmp_path / "a.json")
    ended = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    if ended.returncode in (1, 77) and "Traceback" not in ended.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {ended.stderr.strip()}")
    assert ended.returncode == 2, ended.stderr
    said = " ".join(ended.stderr.split())
    assert "No space left on device" in said and "The last good checkpoint is at step" in said
    step = RunDirectory(tmp_path / "kept").step()
    assert 0 < step < 20
    quietly(kept(source), tmp_path / "kept")
    quietly(kept(source), tmp_path / "other")
    assert_same_run(tmp_path / "kept", tmp_path / "other")

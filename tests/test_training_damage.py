"""Files of a run that were damaged, lost or are somebody else's: named and refused, and left as they are."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from deepdelta import UserError, load
from deepdelta.cli import main
from deepdelta.files import write_json
from deepdelta.tensors import load_tensors, save_tensors
from deepdelta.training import RunDirectory
from deepdelta.training.optimizer import build_optimizer
from tiny_runs import config, quietly, rows, settings, text_file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    quietly(config(source, backend="reference"), run)
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def longer(source: Path) -> Any:
    return config(source, backend="reference", steps=22)


def refused_everywhere(message: str, copy: Path, source: Path, ways: str = "train load init_from") -> None:
    """By training on, by loading, and by starting from it: without a change to the run, or a new one beside it."""
    before = contents(copy)
    attempts: dict[str, Callable[[], Any]] = {
        "train": lambda: quietly(longer(source), copy),
        "load": lambda: load(copy),
        "init_from": lambda: quietly(longer(source), copy.with_name("new"), init_from=copy),
    }
    for way in ways.split():
        with pytest.raises(UserError, match=message):
            attempts[way]()
        assert contents(copy) == before, way
    assert not copy.with_name("new").exists()


def tensor_places(file: Path) -> range:
    """Where the tensors' bytes lie in the file, by its format: after eight bytes of length and that long a header."""
    whole = file.read_bytes()
    return range(8 + int.from_bytes(whole[:8], "little"), len(whole))


@pytest.mark.parametrize("where", ["weights", "optimizer", "exponent", "step"])
def test_a_flipped_bit_of_the_checkpoint(copy: Path, source: Path, where: str) -> None:
    """Also the highest bit of an exponent, from which the next step would diverge: that is no result of the run."""
    file = copy / "checkpoint.safetensors"
    whole, places = bytearray(file.read_bytes()), tensor_places(copy / "checkpoint.safetensors")
    if where == "step":
        place = whole.index(b'"step":"20"') + len(b'"step":"')
        whole[place] ^= 1  # step 30
    else:
        header = json.loads(whole[8 : places.start])
        name = "optimizer.embedding.weight.exp_avg" if where == "optimizer" else "model.layers.0.mlp.branch.out.weight"
        place = places.start + header[name]["data_offsets"][0]
        whole[place + 3 if where == "exponent" else place] ^= 0x40 if where == "exponent" else 0x01
    file.write_bytes(whole)
    refused_everywhere(r"checkpoint\.safetensors is damaged: .*checksum.*restore a copy, or delete", copy, source)
    assert not any("diverged" in row for row in rows(copy))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "audit", "init-from"])
def test_every_command_names_a_damaged_checkpoint(
    copy: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file = copy / "checkpoint.safetensors"
    whole = bytearray(file.read_bytes())
    whole[tensor_places(file)[-5]] ^= 0x10
    file.write_bytes(whole)
    write_json(tmp_path / "a.json", settings(source, backend="reference", steps=22))
    train = ["train", "--config", str(tmp_path / "a.json")]
    arguments = {
        "train": [*train, str(copy)],
        "evaluate": ["evaluate", str(copy), "--device", "cpu"],
        "generate": ["generate", str(copy), "--prompt", "a"],
        "audit": ["audit", str(copy), "--tokens", "16"],
        "init-from": [*train, str(tmp_path / "new"), "--init-from", str(copy)],
    }[command]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err.replace("\n", "")
    assert f"error: {file} is damaged" in said and "Traceback" not in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copy: Path, source: Path, value: float) -> None:
    run, (model, _) = RunDirectory(copy), load(copy)
    with torch.no_grad():
        model.layers[0].attention.branch.key.weight[1, 2] = value
        model.norm.weight[0] = value
    run.save_checkpoint(model, build_optimizer(model, run.config()), step=20, seconds=1.0)
    message = (
        r"checkpoint.safetensors must hold finite weights, but 'layers.0.attention.branch.key.weight' holds NaN or"
    )
    refused_everywhere(message, copy, source)


def test_what_an_import_does_not_use_is_verified_too(copy: Path) -> None:
    run, file = RunDirectory(copy), copy / "unused_published.safetensors"
    run.save_unused({"a": torch.arange(5.0)})
    assert load(copy).model.unused_published["a"].equal(torch.arange(5.0))
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"unused_published\.safetensors is damaged.*import .* anew"):
        load(copy)


def test_tensors_that_are_no_checkpoint(copy: Path, source: Path) -> None:
    save_tensors(copy / "checkpoint.safetensors", {"a": torch.zeros(2)})
    refused_everywhere(r"checkpoint\.safetensors must be a checkpoint, but has no step", copy, source)


def test_the_tokenizer_is_verified(copy: Path) -> None:
    file = copy / "tokenizer.json"
    for damage in (lambda: file.write_text(file.read_text() + " "), file.unlink):
        damage()
        with pytest.raises(UserError, match=r"tokenizer\.json is damaged, another or gone: .*restore it, or delete"):
            load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda there: [there.pop(key) for key in [*there] if key != "format"],
            r"environment\.json: (versions|corpus_sha256): ",
        ),
        (lambda there: there.pop("corpus_sha256"), r"environment\.json: corpus_sha256: "),
        (lambda there: there.pop("threads"), r"environment\.json: threads: "),
        (lambda there: there.update(versions=3), r"environment\.json: versions: .*got 3"),
        (
            lambda there: there.update(format=0, commit="abc"),
            "has format 0, and this version reads 1: read it with deepdelta [0-9.]+ at commit abc",
        ),
        (lambda there: there.update(machine=["x"]), r"environment\.json: machine: "),
        (lambda there: there.update(corpus_sha256=5), r"environment\.json: corpus_sha256: .*got 5"),
        (lambda there: there.update(init_config=[1]), r"environment\.json: init_config: "),
    ],
)
def test_what_the_environment_must_hold(copy: Path, source: Path, change: Any, message: str) -> None:
    there = json.loads((copy / "environment.json").read_text())
    change(there)
    (copy / "environment.json").write_text(json.dumps(there))
    refused_everywhere(message, copy, source, "train load")


def line_of(copy: Path, step: int) -> int:
    """The place among the lines of metrics.jsonl of that of a step."""
    return next(i for i, row in enumerate(rows(copy)) if row["step"] == step and "loss" in row)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"line 5 of .*metrics\.jsonl must hold a JSON object, but is damaged"),
        (b"", r"line 5 of .*metrics\.jsonl must hold a JSON object, but is damaged"),
        (b"\xff\xfe", r"line 5 of .*metrics\.jsonl must hold a JSON object, but is damaged"),
        (b"[" * 100_000, r"line 5 of .*metrics\.jsonl must hold .* at most 100 levels"),
        (b'{"step": ' + b"1" * 5000 + b"}", r"line 5 of .*metrics\.jsonl must hold a JSON object, but is damaged"),
        (b"5", r"metrics\.jsonl must hold .*line 5 is 5"),
        (b"{}", r"metrics\.jsonl must hold .*line 5 is \{\}"),
        (b'{"step": 5, "loss": 1.0}', r"metrics\.jsonl must hold .*line 5 is "),
        (
            b'{"step": 5, "loss": NaN, "lr": 1, "gradient_norm": 1, "seconds": 1}',
            r"metrics\.jsonl must hold .*line 5 is ",
        ),
        (
            b'{"step": 5, "loss": "1", "lr": 1, "gradient_norm": 1, "seconds": 1}',
            r"metrics\.jsonl must hold .*line 5 is ",
        ),
        (
            b'{"step": 5.5, "loss": 1, "lr": 1, "gradient_norm": 1, "seconds": 1}',
            r"metrics\.jsonl must hold .*line 5 is ",
        ),
        (
            b'{"step": 6, "loss": 1, "lr": 1, "gradient_norm": 1, "seconds": 1}',
            r"metrics\.jsonl must hold .*line 5 is of step 6, not 5",
        ),
        (
            b'{"step": 4, "loss": 1, "lr": 1, "gradient_norm": 1, "seconds": 1}',
            r"metrics\.jsonl must hold .*line 5 is of step 4, not 5",
        ),
    ],
)
def test_a_damaged_line_of_the_metrics(copy: Path, source: Path, line: bytes, message: str) -> None:
    file = copy / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[4] = line
    file.write_bytes(b"\n".join(lines))
    message = rf"{message}.*; restore it, or delete .*copy and train anew"
    refused_everywhere(message, copy, source, "train")
    with pytest.raises(UserError, match=message):
        list(RunDirectory(copy).metrics())
    file.write_bytes(line + b"\n")
    if ", not " not in message:
        with pytest.raises(
            UserError, match=r"its last line (is|of) .*metrics\.jsonl|metrics\.jsonl .*its last line is"
        ):
            RunDirectory(copy).last_recorded_step()


def test_lost_lines_of_the_metrics(copy: Path, source: Path) -> None:
    """Of a step in the middle, of the last steps, of the first, and all of them."""
    file = copy / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for kept, message in (
        (lines[:6] + lines[7:], "line 7 is of step 8, not 7"),
        (lines[1:], "line 1 is of step 2, not 1"),
        (lines[: line_of(copy, 18)], "must hold the 20 steps that the checkpoint has behind it, but holds 17"),
        ([], "must hold the 20 steps that the checkpoint has behind it, but holds 0"),
    ):
        file.write_text("".join(kept))
        refused_everywhere(rf"metrics\.jsonl .*{message}", copy, source, "train")


def left_by_a_start(finished: Path, source: Path, folder: Path, steps: int = 0) -> None:
    """Files as a start that was cut short, or a run, leaves them, of other weights than any run of these tests has."""
    folder.mkdir()
    run, (model, _) = RunDirectory(folder), load(finished)
    run.save_checkpoint(model, build_optimizer(model, RunDirectory(finished).config()), step=steps, seconds=0.0)
    for name in ("tokenizer.json", "environment.json", "metrics.jsonl"):
        shutil.copy(finished / name, folder / name)


@pytest.mark.parametrize(
    "names",
    [
        ["tokenizer.json"],
        ["metrics.jsonl"],
        ["environment.json"],
        ["checkpoint.safetensors", "metrics.jsonl"],
        ["checkpoint.safetensors of step 3"],
        ["checkpoint.safetensors of others"],
        ["unused_published.safetensors"],
    ],
)
@pytest.mark.parametrize("command", ["train", "import"])
def test_a_folder_that_is_no_run_keeps_its_files(
    finished: Path, source: Path, tmp_path: Path, names: list[str], command: str
) -> None:
    whole, mine = tmp_path / "whole", tmp_path / "mine"
    left_by_a_start(finished, source, whole, steps=3 if "of step 3" in names[0] else 0)
    (whole / "unused_published.safetensors").write_bytes(b"of the user")
    if "of others" in names[0]:
        (whole / "checkpoint.safetensors").write_bytes(b"of the user")
    mine.mkdir()
    (mine / "notes.txt").write_text("of the user")
    plain = [name.partition(" ")[0] for name in names]
    for name in plain:
        shutil.copy(whole / name, mine / name)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    with pytest.raises(
        UserError, match=rf"mine holds {', '.join(plain)}, which a run would overwrite.*Give another run directory"
    ):
        if command == "train":
            quietly(longer(source), mine)
        else:
            published(tmp_path / "published", mine)
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def published(folder: Path, run: Path) -> None:
    from deepdelta.training import import_published
    from test_interop_import import checkpoint

    import_published(checkpoint(folder), run, None)


def test_a_folder_with_other_files_may_hold_a_run(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("of the user")
    (tmp_path / ".lock").write_text("of the user")
    quietly(config(source, backend="reference", steps=1), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / ".lock").read_text() == "of the user"


def test_an_import_that_was_cut_short_is_made_again(finished: Path, source: Path, tmp_path: Path) -> None:
    left_by_a_start(finished, source, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    published(tmp_path / "published", tmp_path / "run")
    assert load(tmp_path / "run").tokenizer is None


def test_a_name_that_is_not_utf8_is_refused_at_the_start(source: Path, tmp_path: Path) -> None:
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xffn"))
    with pytest.raises(UserError, match=r"the name of a run directory must be UTF-8, got '.*r\\udcffn'; give another"):
        quietly(longer(source), run)
    assert not os.path.lexists(run)


def full_after(monkeypatch: pytest.MonkeyPatch, target: str, step: int) -> None:
    """From a step on, the device has no space left for what `target` writes."""
    module, _, name = target.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)

    def write(*arguments: Any, **options: Any) -> Any:
        row = arguments[1] if isinstance(arguments[1], dict) else {}
        metadata = options.get("metadata") or {}
        if int(metadata.get("step", row.get("step", 0))) >= step:
            Path(os.devnull).with_name("full").write_bytes(b"x")  # /dev/full: every write says ENOSPC
        return original(*arguments, **options)

    monkeypatch.setattr(target, write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_names_the_file_and_the_last_good_step(
    finished: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    full_after(monkeypatch, "deepdelta.tensors.save_file", 14)
    message = (
        r"checkpoint\.safetensors cannot be written: No space left on device.* The last good checkpoint is at step 7 "
        r"in .*run\. Once that is mended, the same command continues\.$"
    )
    with pytest.raises(UserError, match=message):
        quietly(config(source, backend="reference"), run)
    assert RunDirectory(run).step() == 7
    assert {path.name for path in run.iterdir()} == {path.name for path in finished.iterdir()}
    monkeypatch.undo()
    quietly(config(source, backend="reference"), run)
    there, here = (load_tensors(one / "checkpoint.safetensors", "")[0] for one in (finished, run))
    assert rows(run) == rows(finished) and all(there[name].equal(here[name]) for name in there | here)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_too_full_for_the_metrics(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    quietly(config(source, backend="reference", steps=2), run)
    (run / "metrics.jsonl").rename(run / "kept")
    monkeypatch.setattr(RunDirectory, "cut_metrics", lambda self, step: None)
    (run / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(RunDirectory, "metrics", lambda self: iter(()))
    with pytest.raises(
        UserError, match=r"metrics\.jsonl cannot be written: No space left.* checkpoint is at step 2 in "
    ):
        quietly(config(source, backend="reference", steps=4), run)


def test_the_checksum_is_beside_the_step(finished: Path) -> None:
    with safe_open(finished / "checkpoint.safetensors", framework="pt") as opened:
        assert opened.metadata().keys() == {"step", "seconds", "sha256"}

"""Files are written whole or not at all."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from deepdelta import UserError, files
from deepdelta.files import atomic_path, write_json, write_text


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_target_changes_only_when_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent.parent == target.parent and not target.exists()
    assert target.read_text() == "new"
    with atomic_path(target) as temporary:
        temporary.write_text("newer")
        assert target.read_text() == "new"
    assert target.read_text() == "newer"
    assert listing(target.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_file_and_no_temporary(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half of the new o")
        raise error
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["file"]


def test_a_writer_that_fails_before_it_wrote_anything(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "file"):
        raise ZeroDivisionError
    assert listing(tmp_path) == []


def test_json_that_no_reader_accepts_is_not_written(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    write_json(target, {"a": [1, None, "é"]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": [1, None, "é"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"a": float("nan")})
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": [1, None, "é"]}
    assert listing(tmp_path) == ["file.json"]


def test_what_a_killed_writer_leaves_is_removed_at_the_next_write_and_nothing_else(tmp_path: Path) -> None:
    """What the writer's library wrote beside its file goes with it; what a living process writes stays."""
    write_text(tmp_path / "file.txt", "old")
    kept = ["file.txt", ".lock", ".file-0123456789abcdef", ".tmpAbCdEf", ".deepdelta-partial", ".0123456789abcdef"]
    for name in kept[1:]:
        (tmp_path / name).touch()
    (tmp_path / f".{'a' * 16}.deepdelta-partial").write_text("a file of somebody else, though named as our folders are")
    kept.append(f".{'a' * 16}.deepdelta-partial")
    # The module alone, since importing the package takes seconds.
    script = (
        "import pathlib, runpy, sys, time\n"
        "with runpy.run_path(sys.argv[1])['atomic_path'](pathlib.Path('file.txt')) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    (temporary.parent / '.tmpAbCdEf').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(Path(files.__file__).resolve())]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
        write_text(tmp_path / "other.txt", "of this process")
        (partial,) = set(listing(tmp_path)) - {*kept, "other.txt"}
        assert listing(tmp_path / partial) == [".tmpAbCdEf", "file.txt", "lock"]
        writer.kill()
    assert partial in listing(tmp_path) and (tmp_path / "file.txt").read_text() == "old"
    write_text(tmp_path / "other.txt", "again")
    assert listing(tmp_path) == sorted([*kept, "other.txt"])


@pytest.mark.parametrize("holds", [[], ["lock"]])
def test_so_is_what_one_leaves_that_was_killed_before_it_held_its_lock(tmp_path: Path, holds: list[str]) -> None:
    left = tmp_path / f".{'a' * 16}.deepdelta-partial"
    left.mkdir()
    for name in holds:
        (left / name).touch()
    write_text(tmp_path / "file.txt", "new")
    assert listing(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("moment", ["open", "flock"])
def test_a_writer_that_is_taken_for_killed_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another process looks at the folder after it was made and before its lock is, or is held."""
    owner, real = (Path, Path.open) if moment == "open" else (files.fcntl, files.fcntl.flock)
    looked = []

    def meanwhile(*arguments: object, **options: object) -> object:
        folders = [path for path in tmp_path.iterdir() if path.name.endswith(".deepdelta-partial")]
        if not looked and folders:
            looked.append(folders[0])
            files.remove_abandoned(tmp_path)
            assert not folders[0].exists()
        return real(*arguments, **options)  # type: ignore[operator]

    monkeypatch.setattr(owner, moment, meanwhile)
    with atomic_path(tmp_path / "file.txt") as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent not in looked
    monkeypatch.undo()
    assert len(looked) == 1 and (tmp_path / "file.txt").read_text() == "new"
    assert listing(tmp_path) == ["file.txt"]


def test_what_holds_no_object_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    with pytest.raises(UserError, match=r"file.json cannot be read: No such file or directory. Mend it."):
        files.read_object(file, "mend it")
    for data, message in (
        (b"{", "must hold a JSON object, but is damaged"),
        (b"\xff", "must hold a JSON object, but is damaged"),
        (b"[1]", "must hold a JSON object, got list; mend it."),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=message):
            files.read_object(file, "mend it")
    write_json(file, {"a": 1})
    assert files.read_object(file, "mend it") == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})
    assert files.read_object(file, "mend it") == {"a": 1}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of a user whom permissions bind, which they do not the superuser; the test runs as that user."""
    nobody = 65534 if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, nobody, -1)
        os.seteuid(nobody)
        yield Path(name)
        Path(name).chmod(0o700)
        os.seteuid(os.getuid())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    """The same as of a file that the system's own `open` makes; safetensors' writer makes 0600 under every umask."""
    before = os.umask(umask)
    try:
        (tmp_path / "plain").touch()
        write_text(tmp_path / "text", "a")
        with atomic_path(tmp_path / "tensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert expected == 0o666 & ~umask
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("text", "tensors")} == {expected}


def test_the_file_and_then_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy(descriptor: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(one: Path, other: Path) -> None:
        synced.append("renamed")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "file", "a")
    assert synced == ["file", "renamed", "folder"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without space")
def test_no_space_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(UserError, match=r"file cannot be written: No space left on device. What was there before is"):
        with atomic_path(target), open("/dev/full", "w") as full:
            full.write("new")
    with pytest.raises(UserError, match=r"file cannot be written: .*No space left on device"):
        with atomic_path(target):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert target.read_text() == "old" and listing(tmp_path) == ["file"]


def test_a_folder_without_permission_names_the_file(place: Path) -> None:
    write_json(place / "file", {})
    place.chmod(0o555)
    with pytest.raises(UserError, match=r"file cannot be written: Permission denied"):
        write_json(place / "file", {"a": 1})
    (place / "file").chmod(0)
    with pytest.raises(UserError, match=r"file cannot be read: Permission denied. Mend it."):
        files.read_object(place / "file", "mend it")
    with pytest.raises(UserError, match=r"cannot be a folder for results: Permission denied"):
        files.check_folder(place)
    with pytest.raises(
        UserError, match=r"below cannot be a folder for results: Permission denied. Give another run directory"
    ):
        files.check_folder(place / "below", "run directory")


def test_a_name_that_is_too_long_for_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a{300} cannot be written: File name too long"):
        write_text(tmp_path / ("a" * 300), "a")
    for out in (
        tmp_path / ("a" * 300),
        tmp_path / "new" / ("a" * 300) / "deeper",
        tmp_path.joinpath(*["a" * 200] * 25),
    ):
        with pytest.raises(UserError, match=r"cannot be a folder for results: File name too long. Give another --out"):
            files.check_folder(out)
    assert listing(tmp_path) == []


def test_a_folder_that_can_be_one_is_left_as_it_was(tmp_path: Path) -> None:
    write_text(tmp_path / "there" / "file", "a")
    files.check_folder(tmp_path / "there")
    files.check_folder(tmp_path / "new" / "below")
    assert listing(tmp_path) == ["there"] and listing(tmp_path / "there") == ["file"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link cannot be a folder for results: File exists"):
        files.check_folder(tmp_path / "link")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[" * 20_000 + "]" * 20_000, "of at most 100 levels, but is deeper; mend it"),
        ("a.json", "[" * 102 + "]" * 102, "of at most 100 levels, but is deeper; mend it"),
        ("a.json", '{"a":' * 5000 + "1" + "}" * 5000, "of at most 100 levels, but is deeper; mend it"),
        ("a.toml", "a = " + "[" * 2000 + "]" * 2000, "of at most 100 levels, but is deeper; mend it"),
        ("a.toml", ".".join("a" * 500) + " = 1", "of at most 100 levels, but is deeper; mend it"),
        ("a.json", '{"a": ' + "1" * 5000 + "}", "is damaged .*; mend it"),
        ("a.toml", "a = " + "1" * 5000, "is damaged .*; mend it"),
        ("a.toml", "a = 0x" + "f" * 5000, "integers of at most 64 bits, but has a larger one; mend it"),
        ("a.json", '{"a": ["\\ud800"]}', "text of Unicode, but has half of a surrogate pair; mend it"),
        ("a.json", '{"\\udfff": 1}', "text of Unicode, but has half of a surrogate pair; mend it"),
        ("a.json", f'{{"a": [[{1 << 64}]]}}', "integers of at most 64 bits, but has a larger one; mend it"),
    ],
)
def test_data_that_no_walk_survives_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} must hold .*{message}") as caught:
        files.read_object(tmp_path / name, "mend it")
    assert len(str(caught.value)) < 400


def test_the_deepest_and_the_largest_that_are_read(tmp_path: Path) -> None:
    deep = '{"a":' * 100 + str((1 << 64) - 1) + "}" * 100
    (tmp_path / "a.json").write_text(deep)
    assert files.read_plain(tmp_path / "a.json", "mend it") == json.loads(deep)
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert files.read_object(tmp_path / "a.toml", "mend it") == {"a": 1}

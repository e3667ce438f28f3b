"""Files are written whole or not at all."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepdelta import UserError, files
from deepdelta.files import atomic_path, remove_temporaries, write_json, write_text


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_target_changes_only_when_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent and not target.exists()
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


def test_what_a_killed_writer_leaves_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "old")
    kept = ["file.txt", ".lock", ".hidden-file", ".file-0123456789abcdeg", "file-0123456789abcdef"]
    for name in kept[1:]:
        (tmp_path / name).touch()
    # The module alone, since importing the package takes seconds.
    script = (
        "import os, pathlib, runpy, signal, sys\n"
        "with runpy.run_path(sys.argv[1])['atomic_path'](pathlib.Path('file.txt')) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(Path(files.__file__).resolve())], cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL
    assert len(listing(tmp_path)) == len(kept) + 1 and (tmp_path / "file.txt").read_text() == "old"
    remove_temporaries(tmp_path)
    assert listing(tmp_path) == sorted(kept)


def test_what_holds_no_object_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    with pytest.raises(
        UserError, match=r"must hold a JSON object, but cannot be read \(No such file or directory\); mend"
    ):
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

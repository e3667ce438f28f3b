"""Files are written whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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

"""What a process sets up before it trains."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from deepdelta import provenance

SCRIPT = """
import sys
import torch
from deepdelta.device import keep_freed_memory

PAGE = {page}
def held():
    return int(open("/proc/self/statm").read().split()[1]) * PAGE

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = held()
block = torch.ones(25_000_000)
assert held() - before > 90_000_000
del block
print((held() - before) // 1_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("argument", "kept"), [("keep", True), ("leave", False)])
def test_freed_memory_is_kept_only_where_asked(argument, kept):
    script = SCRIPT.format(page=os.sysconf("SC_PAGE_SIZE"))
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 90) == kept


class Repository:
    """A folder of git with a copy of the package's file in it, which `commit` is asked about."""

    def __init__(self, root: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.package = root, root / inside / "deepdelta"
        self.file = self.package / "provenance.py"
        self.file.parent.mkdir(parents=True)
        self.file.write_text("source = 1\n")
        (root / "own.txt").write_text("the user's own\n")
        self.git("init", "-q")
        self.git("add", "own.txt")
        monkeypatch.setattr(provenance, "__file__", str(self.file))

    def git(self, *arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(self.root), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self) -> str:
        self.git("commit", "-q", "-m", "a commit")
        return self.git("rev-parse", "HEAD")


def test_commit_of_the_tree_that_tracks_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Repository(tmp_path, "src", monkeypatch)
    assert provenance.commit() is None  # before the first commit
    there.git("add", ".")
    head = there.commit()
    assert provenance.commit() == head
    (there.root / "own.txt").write_text("a change outside of the package")
    (there.package / "__pycache__").mkdir()
    (there.package / "__pycache__" / "a.pyc").write_text("no source")
    assert provenance.commit() == head
    other = there.package / "new.py"
    other.touch()
    assert provenance.commit() == f"{head}+changes"
    other.unlink()
    there.file.write_text("source = 2\n")
    assert provenance.commit() == f"{head}+changes"
    there.git("add", ".")
    assert provenance.commit() == f"{head}+changes"
    assert provenance.commit() != there.commit() == provenance.commit()
    there.file.rename(there.package / "elsewhere.py")
    assert provenance.commit() == there.git("rev-parse", "HEAD") + "+changes"


def test_no_commit_of_a_project_in_whose_folder_the_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Repository(tmp_path, ".venv/lib/site-packages", monkeypatch)
    there.commit()
    assert provenance.commit() is None


def test_no_variable_chooses_another_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Repository(tmp_path / "other", "src", monkeypatch)
    other.git("add", ".")
    other.commit()
    mine = Repository(tmp_path / "mine", "src", monkeypatch)
    (mine.root / "own.txt").write_text("another project\n")
    mine.git("add", ".")
    head = mine.commit()
    assert head != other.git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other.root / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other.root))
    assert provenance.commit() == head


@pytest.mark.parametrize("tracked", [True, False])
def test_nothing_that_a_repository_names_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: bool) -> None:
    there = Repository(tmp_path / "repository", "src", monkeypatch)
    (there.root / ".gitattributes").write_text("*.py filter=own\n")
    there.git("add", *(["."] if tracked else []), ".gitattributes")
    head = there.commit()
    marker, script = tmp_path / "was run", tmp_path / "script"
    script.write_text(f"#!/bin/sh\ntouch '{marker}'\ncat\n")
    script.chmod(0o755)
    there.git("config", "core.fsmonitor", str(script))
    there.git("config", "filter.own.clean", str(script))
    os.utime(there.file, (1, 1))
    assert provenance.commit() == (head if tracked else None)
    assert not marker.exists()
    there.git("status")
    assert marker.exists()  # what was asked before

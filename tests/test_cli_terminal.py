"""What the command does to terminals and to the file system's errors: one line, nothing that a terminal obeys."""

import errno
import io
import os
import shutil
import stat
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

from deepdelta import UserError
from deepdelta.cli import main
from deepdelta.errors import printable
from deepdelta.files import write_json
from deepdelta.lab.views import plot, study_markdown
from deepdelta.lab.views.page import render_page
from deepdelta.lab.views.tables import Column, TextTable, render
from deepdelta.progress import reporting, show
from report_samples import study
from tiny_runs import ENVIRONMENT, config, quietly, settings, text_file

pytestmark = pytest.mark.usefixtures("unchecked")

HOSTILE = "\x1b[2Ja\x07b\x9b31mc\u202ed\x00"
ESCAPED = r"\x1b[2Ja\x07b\x9b31mc\u202ed\x00"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


def ended(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of an exit with code 2."""
    capsys.readouterr()
    assert ended(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Owned by and read-only for a user whom permissions bind; the process is that user."""
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, -1)
        path.chmod(0o555 if path.is_dir() else 0o444)
    "".encode("utf-8-sig")  # Python's own files may be out of that user's reach
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file"), "error: /a/file: No space left on device\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "error: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a\x1b[2J"), "error: a\\x1b[2J: Permission denied\n"),
        (SafetensorError("header too large"), "error: header too large\n"),
        (MemoryError(), "error: there is not enough memory: make the model or the batch smaller.\n"),
        (
            RuntimeError("[enforce fail at a.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
            "error: there is not enough memory: make the model or the batch smaller. [enforce fail",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 8\nmore"), "batch smaller. CUDA out of memory. Tried 8\n"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("deepdelta.cli.runs.load", refuse)
    assert said in error(capsys, "generate", "run", "--prompt", "a")


def test_errors_that_are_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for ours in (RuntimeError("shapes"), TypeError("a"), ValueError("b")):

        def fail(*arguments: object, ours: Exception = ours) -> None:
            raise ours

        monkeypatch.setattr("deepdelta.cli.runs.load", fail)
        with pytest.raises(type(ours), match=str(ours)):
            main(["generate", "run", "--prompt", "a"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without space")
def test_an_output_without_space(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepdelta.cli.doctor.Doctor.__call__", lambda self: print("much"))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert "No space left on device" in error(capsys, "doctor")
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.close()


def test_a_finished_run_in_a_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It is refused before any work; who only reads it may."""
    base = Path("/tmp") if os.geteuid() == 0 else tmp_path_factory.mktemp("base")
    place = base / f"deepdelta-{os.getpid()}"
    place.mkdir()
    try:
        shutil.copy(source, place / "text.txt")
        run = place / "run"
        quietly(config(place / "text.txt", steps=2), run)
        main(["evaluate", str(run)])  # compiles its loops in a folder that the other user cannot write
        write_json(place / "a.json", settings(place / "text.txt", steps=2))
        command = ("train", run, "--config", place / "a.json")
        with unwritable(place):
            said = error(capsys, *command)
            assert (
                said == f"error: {run} cannot be a folder for results: Permission denied. Give another run directory.\n"
            )
            said = error(capsys, "audit", run)
            assert f"{run / 'audit'} cannot be a folder for results: Permission denied. Give another --out." in said
            main(["evaluate", str(run)])
        assert "nats per token" in capsys.readouterr().out
        (run / "checkpoint.safetensors").chmod(0)
        (place / "a.json").chmod(0)
        os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())
        assert "checkpoint.safetensors cannot be read: Permission denied" in error(
            capsys, "generate", run, "--prompt", "a"
        )
        assert "a.json cannot be read: Permission denied" in error(capsys, *command)
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(place)


def test_names_that_the_file_system_refuses(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    """Before any work: nothing but the one line is said."""
    long = tmp_path / ("a" * 300)
    for command in (
        ("train", long, "--data.source", source),
        ("study", "quick", "--source", source, "--out", long),
        ("task", "tabular", "--out", long),
        ("bench", "bar", "--quick", "--out", long),
        ("bench", "gradients", "--out", long),
        ("import", tmp_path, "--run", long),
        ("evaluate", long),
        ("train", tmp_path / "run", "--config", long),
        ("train", tmp_path / "run", "--data.source", long),
    ):
        assert "File name too long" in error(capsys, *command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [("--model.dim", "10", "--model.heads", "3"), ("--model.residual.rank", "-1"), ("--steps", "0")]
)
def test_settings_are_refused_in_one_line_of_ours(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: tuple[str, ...]
) -> None:
    said = error(capsys, "train", tmp_path / "run", *option)
    assert "tyro" not in said and ("must be" in said or "must lie" in said)


def test_what_a_terminal_obeys_is_escaped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert printable(HOSTILE) == ESCAPED and printable("a\tb\n€ \u00a0ب\u200d") == "a\tb\n€ \u00a0ب\u200d"
    assert str(UserError(HOSTILE)) == ESCAPED == str(UserError(ESCAPED))
    assert printable("\udcff") == r"\udcff"
    hostile = tmp_path / "\x1b]0;owned\x07[/red]"
    assert "\x1b" not in error(capsys, "evaluate", hostile)
    show(f"at {hostile}")
    assert capsys.readouterr().out == f"at {tmp_path}/\\x1b]0;owned\\x07[/red]\n"
    (tmp_path / "\x1b[2J.toml").write_text('[model]\n"\\u001b[2J" = 1')
    said = error(capsys, "train", tmp_path / "run", "--config", tmp_path / "\x1b[2J.toml")
    assert "\x1b" not in said and "\\x1b[2J.toml.model: unknown key '\\x1b[2J'" in said


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_and_tables_escape_what_they_name(terminal: bool) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, color_system=None, width=200, legacy_windows=False)
    with reporting(f"{HOSTILE}[/red]", 1, console=console) as reporter:
        reporter.note(HOSTILE)
        reporter.update(1, "[/blue]")
    console.print(render(TextTable(columns=(Column(title=HOSTILE),), rows=((HOSTILE,),), title=HOSTILE)))
    text = written.getvalue()
    assert ESCAPED in text and f"{ESCAPED}[/red]" in text and "[/blue]" in text
    assert not {"\x07", "\x9b", "\u202e", "\x00"} & set(text) and "\x1b[2Ja" not in text


def test_pages_and_pictures_hold_no_control_characters() -> None:
    """The picture is well-formed XML, which XML's own parser says, and shows the names escaped."""
    results = study()
    named = replace(
        results,
        name=f"{results.name}{HOSTILE}",
        conditions=tuple(replace(one, summary=f"{one.summary}{HOSTILE}") for one in results.conditions),
        corpus=replace(results.corpus, description=HOSTILE),
    )
    picture = plot(named)
    ElementTree.fromstring(picture)
    assert ESCAPED in picture
    for text in (picture, study_markdown(named), render_page(named)):
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\x00"} & set(text)
    for kept in ("\x85", "\ufffe", "\x7f"):
        ElementTree.fromstring(plot(replace(results, name=kept)))


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["generate", "RUN", "--prompt", "é€"]])
def test_a_terminal_of_ascii(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path, command: list[str]) -> None:
    run = tmp_path / "run"
    if "RUN" in command:
        quietly(config(source, steps=1), run)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    try:
        main([str(run) if word == "RUN" else word for word in command])
    except SystemExit as end:
        assert end.code == 0
    sys.stdout.flush()
    assert written.getvalue().isascii() and len(written.getvalue()) > 3
    if "RUN" in command:
        assert written.getvalue().startswith(b"??")


def test_generated_text_is_escaped_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    quietly(config(source, steps=1), tmp_path / "run")
    command = ["generate", str(tmp_path / "run"), "--prompt", "\x1b[2J", "--tokens", "0"]
    main(command)
    assert capsys.readouterr().out == "\x1b[2J\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(command)
    assert capsys.readouterr().out == "\\x1b[2J\n"


@pytest.mark.parametrize("module", ["-m deepdelta", "script", "library"])
def test_interrupted_while_importing(tmp_path: Path, module: str) -> None:
    """A package that the import comes to sends the signal: no traceback, unless another program is importing."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    code = "from deepdelta.cli import main; main()"
    (tmp_path / "deepdelta").write_text(code)
    command = {
        "-m deepdelta": ["-m", "deepdelta", "doctor"],
        "script": [str(tmp_path / "deepdelta"), "doctor"],
        "library": ["-c", code],
    }[module]
    path = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if module == "library":
        assert done.returncode != 130 and "KeyboardInterrupt" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (130, "interrupted\n")

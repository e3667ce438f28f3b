"""Commands that write results: what their end needs is looked at first, their folder is held, names are listed."""

import os
import sys
from pathlib import Path

import pytest

from deepdelta.cli import main
from deepdelta.errors import require
from deepdelta.files import HELD, locked
from deepdelta.lab.bench import QUESTIONS, SUITES
from deepdelta.lab.experiments.config import load_study, named_studies
from deepdelta.lab.tasks import load_task, named_tasks
from tiny_runs import config, quietly, text_file

pytestmark = pytest.mark.usefixtures("unchecked")

COMMANDS = {
    "study": ("study", "quick", "--source", "SOURCE"),
    "task": ("task", "words"),
    "audit": ("audit", "RUN"),
    "bench": ("bench", "operator", "--quick"),
    "gradients": ("bench", "gradients", "--quick"),
}
NEEDED = [
    *(("study", "lab", package) for package in ("scipy", "jinja2", "plotly")),
    ("task", "lab", "scipy"),
    *(("audit", "lab", package) for package in ("scipy", "jinja2", "plotly")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a text and a run."""
    folder = tmp_path_factory.mktemp("folder")
    quietly(config(text_file(folder / "text.txt"), steps=1), folder / "run")
    return folder


def refused(capsys: pytest.CaptureFixture[str], folder: Path, command: str, out: Path) -> str:
    places = {"SOURCE": str(folder / "text.txt"), "RUN": str(folder / "run")}
    with pytest.raises(SystemExit) as ended:
        main([*(places.get(word, word) for word in COMMANDS[command]), "--out", str(out)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    return said


@pytest.mark.parametrize(("command", "extra", "package"), NEEDED, ids=" ".join)
def test_a_package_that_is_needed_at_the_end_is_missed_before_the_work(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tmp_path: Path,
    command: str,
    extra: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(capsys, folder, command, tmp_path / "out")
    assert f"need the extra '{extra}', but the package {package} is absent" in said
    assert f'pip install "deep-delta-learning[{extra}]"' in said and f'pip install -e ".[{extra}]"' in said
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_there_are_needed_in_vain() -> None:
    require("things", "lab", "scipy", "jinja2", "plotly")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_where_a_command_is_at_work_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    with locked(out):
        said = refused(capsys, folder, command, out)
        assert f"{out} is in use by process {os.getpid()}: wait for it, stop it, or give another --out." in said
        assert [path.name for path in out.iterdir()] == [HELD]


def listed(text: str) -> dict[str, str]:
    rows = (line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  "))
    return {name: what for name, what in rows}


def test_what_there_is_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    questions = {name: load_study(name).question for name in named_studies()}
    summaries = {name: load_task(name).summary for name in named_tasks()}
    suites = {name: suite.question for name, suite in SUITES.items()}
    suites |= {name: QUESTIONS[name] for name in ("gradients", "depth")}
    for command, kind, expected in (
        ("study", "study", questions),
        ("task", "task", summaries),
        ("bench", "suite", suites),
    ):
        main([command])
        assert listed(capsys.readouterr().out) == expected
        with pytest.raises(SystemExit):
            main([command, "absent"])
        said = capsys.readouterr().err
        kind = {"bench": "suite"}.get(command, command)
        assert f"there is no {kind} 'absent'." in said and listed(said) == expected

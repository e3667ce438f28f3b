"""What all commands have alike: threads, paths in the home directory, the line that says what comes next."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_type_hints

import pytest
import torch

from deepdelta.cli import COMMANDS, main
from deepdelta.cli.options import parse
from deepdelta.training import load
from tiny_runs import config, nats, quietly, text_file, typed

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    quietly(config(source, steps=3, threads=2), run)
    torch.set_num_threads(1)
    return run


def out(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    main([*map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [("evaluate",), ("generate", "--prompt", "a", "--tokens", "1"), ("audit",)], ids=str
)
def test_threads_are_the_run_s_own_unless_given(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, finished: Path, tmp_path: Path
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    name, *options = command
    more = ("--out", str(tmp_path)) if name == "audit" else ()
    main([name, str(finished), *options, *more])
    assert asked == [2]
    main([name, str(finished), *options, *more, "--threads", "1"])
    assert asked == [2, 1]
    with pytest.raises(SystemExit) as ended:
        main([name, str(finished), *options, *more, "--threads", str(10**18)])
    assert ended.value.code == 2 and asked == [2, 1]


def test_every_command_that_computes_in_its_own_process_takes_threads() -> None:
    own = {name for name, kind in COMMANDS.items() if "threads" in {one.name for one in dataclasses.fields(kind)}}
    # train has them among its settings, import, export, plan and watch compute nothing, a task's runs have one thread
    # each, and tokenizers, which prepare uses, has threads of its own.
    assert own == set(COMMANDS) - {"train", "import", "export", "plan", "prepare", "task", "watch"}


def test_threads_of_a_study_are_those_of_its_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr("deepdelta.lab.runner.run", lambda study, out, **options: seen.append(study))
    (tmp_path / "table.md").touch()
    main(["study", "quick", "--out", str(tmp_path), "--threads", "3"])
    assert [seen[0].train_config(name, 0).threads for name in seen[0].conditions] == [3] * 5


POSITIONAL = ("train run", "evaluate run", "generate run", "audit run", "import folder", "export run", "prepare source")


def test_paths_of_every_command_may_lie_in_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("{}")
    words = {"train": "r", "import": "r --run r", "study": "quick", "task": "words"}
    words |= {
        "export": "r --to hf --out r",
        "prepare": "r --out r --tokenizer r",
        "evaluate": "r",
        "generate": "r --prompt a",
        "audit": "r",
    }
    checked = set()
    for name, kind in COMMANDS.items():
        for field, hint in get_type_hints(kind).items():
            if hint is Path or (isinstance(hint, UnionType) and set(get_args(hint)) == {Path, NoneType}):
                given = words.get(name, "")
                if f"{name} {field}" in ("explore run", "watch path"):
                    typed_words = ["~/file"]
                elif f"{name} {field}" in POSITIONAL:
                    typed_words = given.replace("r", "~/file", 1).split()
                else:
                    option = {"beside": "with"}.get(field, field.replace("_", "-"))
                    typed_words = [*given.replace(f"--{field} r", "").split(), f"--{option}=~/file"]
                assert getattr(parse([name, *typed_words]), field) == tmp_path / "file", typed_words
                checked.add(f"{name} {field}")
    assert checked >= {"train run", "train config", "train init_from", "import folder", "import run", "study out"}
    (tmp_path / "a.toml").write_text("steps = 7")
    assert typed(monkeypatch, "--config=~/a.toml").steps == 7


def test_evaluate_on_a_part(capsys: pytest.CaptureFixture[str], source: Path, finished: Path) -> None:
    whole = out(capsys, "evaluate", finished)
    assert "the whole validation split" in whole
    total = len(source.read_bytes()) - int(len(source.read_bytes()) * 0.9)
    part = out(capsys, "evaluate", finished, "--tokens", "32")
    assert f"on 32 tokens, of the {total} of the validation split; contexts: " in part
    loss = float(part.split()[1])
    bits = float(part.split("bits per byte")[1].split(",")[0])
    assert bits == pytest.approx(loss / 0.6931472, abs=2e-4)
    from deepdelta.data import load_corpus
    from deepdelta.training import RunDirectory

    split = load_corpus(RunDirectory(finished).config().data).validation
    model = load(finished).model
    # Two of the windows of 16 tokens that the split holds.
    starts = [index * ((len(split) - 1) // 16) // 2 * 16 for index in range(2)]
    expected = [nat for start in starts for nat in nats(model, split[start : start + 17])]
    assert loss == pytest.approx(sum(expected) / 32, abs=6e-5)
    with pytest.raises(SystemExit):
        main(["evaluate", str(finished), "--tokens", "0"])
    assert "tokens must be at least 1, got 0" in capsys.readouterr().err


def test_what_comes_next(capsys: pytest.CaptureFixture[str], source: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "a run"))
    said = out(capsys, "train", run, "--config", run / "config.json")
    assert f"Next: deepdelta generate '{run}' --prompt TEXT, or deepdelta evaluate '{run}'" in said
    assert f"Next: deepdelta audit '{run}'" in out(capsys, "evaluate", run)
    said = out(capsys, "audit", run, "--tokens", "32", "--sample", "2")
    assert f"Next: read {run / 'audit' / 'audit.html'}" in said and (run / "audit" / "audit.html").exists()


def test_a_warm_up_that_never_ends_is_said(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    plain = {"steps": 2, "warmup": 2, "batch_size": 2, "data": {"source": str(source)}, "device": "cpu"}
    plain["model"] = {"context": 16, "layers": 1, "heads": 2, "dim": 16}
    (tmp_path / "a.json").write_text(json.dumps(plain))
    said = out(capsys, "train", tmp_path / "run", "--config", tmp_path / "a.json")
    assert "Warning: warmup=2 reaches steps=2" in said


def test_what_help_says_exists() -> None:
    """No section numbers of a text that is not there."""
    for file in (Path(__file__).parent.parent / "src").rglob("*.py"):
        assert not re.search(r"[Ss]ection \d", file.read_text(encoding="utf-8")), file

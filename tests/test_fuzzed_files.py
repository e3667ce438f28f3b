"""Files that came to harm, or were made to do some, end in an error that names them, and never in a traceback.

A case is a good file with one change, drawn from the case's number: a value replaced by one that is hostile to whoever
walks, counts, formats or writes it; a key that is gone or new; bytes flipped, cut off or repeated. What is read is then
used as its command uses it first.
"""

import copy
import json
import lzma
import random
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from deepdelta import UserError, load
from deepdelta.cli.options import _settings
from deepdelta.config import from_plain, to_plain
from deepdelta.data.tokenizer import read_tokenizer
from deepdelta.device import choose_device
from deepdelta.files import read_object, write_json
from deepdelta.interop import load_published
from deepdelta.lab.analysis.results import load_results
from deepdelta.lab.bench.results import load_results as load_bench
from deepdelta.lab.experiments.config import load_study
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.training import RunDirectory, TrainConfig
from deepdelta.training.loop import check_size
from report_samples import study
from test_oracle import vector
from tiny_runs import config, quietly, settings, text_file

pytestmark = pytest.mark.usefixtures("unchecked")
CASES = 40
"""Of each kind of file."""

DEEP: Any = []
for _ in range(90):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1 << 62, (1 << 64) - 1, 1 << 70, 1 << 4000, 0.5, 1e308, -1e-320, float("nan"), float("inf")),
    *("", "\0", "\x1b[2J", "\ud800", "\ufffe", "a" * 5000, "1", "nan", "bpe", [], [[]], {}, {"": 0}, [None] * 50),
    *({"\ud800": 1}, ["\0"], DEEP, {"a": DEEP}),
)
HOSTILE_TOML = (
    *("", "0", "-1", "1_0", "9" * 5000, "0x" + "f" * 5000, "1e308", "nan", "inf", "''", '"\\u0000"', '"\\u001b[2J"'),
    *("1979-05-27", "00:00:00", "[]", "[" * 500 + "]" * 500, "{}", "{a = 1}", "true", "'''a\nb'''", "[1, 'a']"),
)


def changed(good: Any, draw: random.Random) -> Any:
    """A copy with one value replaced, or one key gone or new."""
    plain = copy.deepcopy(good)
    holder, key = draw.choice([place for place in places(plain)])
    what = draw.random()
    if what < 0.1 and isinstance(holder, dict):
        del holder[key]
    elif what < 0.2 and isinstance(holder, dict):
        holder[draw.choice(["", "a", "\x1b", "\ud800", "__class__", "name"])] = draw.choice(HOSTILE)
    else:
        holder[key] = copy.deepcopy(draw.choice(HOSTILE))
    return plain


def places(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Every value, as what holds it and its key there."""
    for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain):
        yield plain, key
        if isinstance(value, dict | list):
            yield from places(value)


def harmed(content: bytes, draw: random.Random) -> bytes:
    """The bytes with some flipped, cut off, repeated or put in."""
    at, length = draw.randrange(len(content)), draw.randrange(1, 20)
    return draw.choice(
        (
            content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
            content[:at],
            content[:at] + content[at : at + length] * 2 + content[at + length :],
            content[:at] + draw.choice((b"\0", b"\xff", b'"', b"{", b"[" * 5000, b"9" * 5000, b"\x1b")) + content[at:],
        )
    )


def settings_of_a_run(file: Path) -> None:
    read = _settings(["--config", str(file)])
    if read.model.vocab_size is not None:
        check_size(read, choose_device("cpu", "fp32"))
    assert from_plain(TrainConfig, to_plain(read)) == read


def run_directory(file: Path) -> None:
    load(file.parent)


def environment(file: Path) -> None:
    run = RunDirectory(file.parent)
    run.check_environment(run.environment(), exact=True)


def metrics(file: Path) -> None:
    run = RunDirectory(file.parent)
    list(run.metrics())
    run.last_recorded_step()


def results(file: Path) -> None:
    load_results(file)


def tokenizer(file: Path) -> None:
    made = read_tokenizer(file)
    made.decode(made.encode("ab c"))


def published(file: Path) -> None:
    load_published(read_object(file, "restore it"), vector("cc").parameters)


def records(file: Path) -> None:
    """The lines as they are, in the file that a study keeps them in."""
    folder = file.parent / "study"
    folder.mkdir(exist_ok=True)
    (folder / "runs.jsonl.xz").write_bytes(lzma.compress(file.read_bytes()))
    for row in RecordFile(folder).rows().values():
        from_plain(RunRecord, row, where=str(file))


def bench(file: Path) -> None:
    load_bench(file)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    source = text_file(folder / "text.txt")
    quietly(config(source, steps=2, data={"source": str(source), "tokenizer": "bpe", "bpe_vocab_size": 260}), folder)
    write_json(folder / "settings.json", settings(source, model={"vocab_size": 256}))
    study().save(folder / "results.json")
    write_json(folder / "published.json", vector("cc").config)
    shipped = Path(__file__).parents[1] / "results"
    (folder / "bench.json").write_bytes((shipped / "bench-bar" / "results.json").read_bytes())
    lines = lzma.decompress((shipped / "headline" / "runs.jsonl.xz").read_bytes()).splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(lines[:3]))
    return folder


KINDS: dict[str, Callable[[Path], None]] = {
    "settings.json": settings_of_a_run,
    "config.json": run_directory,
    "environment.json": environment,
    "metrics.jsonl": metrics,
    "results.json": results,
    "tokenizer.json": tokenizer,
    "published.json": published,
    "records.jsonl": records,
    "bench.json": bench,
}


def fault(use: Callable[[Path], object], file: Path, case: int) -> list[str]:
    """What else than a result or a refusal of some lines comes of using the file."""
    try:
        use(file)
    except UserError as error:
        return [f"case {case}: {error}"] if len(str(error)) > 8000 else []
    except Exception as error:
        return [f"case {case}: {type(error).__name__}: {str(error)[:200]}"]
    return []


@pytest.mark.parametrize("kind", KINDS)
def test_json(good: Path, tmp_path: Path, kind: str) -> None:
    content = (good / kind).read_bytes()
    for other in good.iterdir():
        if other.is_file():
            (tmp_path / other.name).write_bytes(other.read_bytes())
    KINDS[kind](tmp_path / kind)
    faults: list[str] = []
    for case in range(CASES):
        draw = random.Random(f"{kind} {case}")
        if case % 3 == 2:
            bad = harmed(content, draw)
        elif kind.endswith(".jsonl"):
            lines = content.splitlines()
            lines.insert(draw.randrange(3), json.dumps(changed(json.loads(lines[0]), draw)).encode())
            bad = b"\n".join(lines) + b"\n"
        else:
            bad = json.dumps(changed(json.loads(content), draw)).encode()
        (tmp_path / kind).write_bytes(bad)
        faults += fault(KINDS[kind], tmp_path / kind, case)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["quick", "erase-on-norm"])
def test_toml(tmp_path: Path, name: str) -> None:
    lines = (resources.files("deepdelta.lab") / "studies" / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    file, faults = tmp_path / "study.toml", list[str]()
    for case in range(CASES):
        draw = random.Random(f"{name} {case}")
        mine = list(lines)
        at = draw.choice([number for number, line in enumerate(lines) if "=" in line or line.startswith("[")])
        if "=" in mine[at] and case % 3:
            mine[at] = f"{mine[at].partition('=')[0]}= {draw.choice(HOSTILE_TOML)}"
            bad = "\n".join(mine).encode()
        else:
            bad = harmed("\n".join(mine).encode(), draw)
        file.write_bytes(bad)
        faults += fault(lambda file: load_study(str(file)), file, case)
    assert not faults, "\n".join(faults)

"""Bad input through the command: exit code 2, a message that names what to mend, no traceback, nothing half-written."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from deepdelta.cli import main
from deepdelta.files import write_json
from tiny_runs import config, quietly, settings, text_file

# As users run it: tyro's mark for a missing option is no Path, which the run-time type checks would refuse.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    quietly(config(source, steps=3), run)
    return run


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command says on stderr before it exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "Traceback" not in said.err and said.err.strip()
    return said.err


def refused(capsys: pytest.CaptureFixture[str], message: str, folder: Path, *options: str | Path) -> None:
    """`deepdelta train` with these options says `message` and leaves no run directory."""
    said = error(capsys, "train", folder / "run", "--device", "cpu", *options)
    assert message in said
    assert not (folder / "run").exists()


SMALL = ("--model.context", "16", "--model.dim", "16", "--model.layers", "1", "--model.heads", "2", "--steps", "2")


def test_data_that_is_missing_or_empty(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused(capsys, "there is nothing at 'no/such/file'", tmp_path, *SMALL, "--data.source", "no/such/file")
    (tmp_path / "empty.txt").touch()
    refused(capsys, "must be a file with something in it", tmp_path, *SMALL, "--data.source", tmp_path / "empty.txt")
    (tmp_path / "folder").mkdir()
    refused(capsys, "must hold at least one non-empty file", tmp_path, *SMALL, "--data.source", tmp_path / "folder")


def test_text_that_is_not_utf8_and_a_bpe(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "latin.txt"
    whole = source.read_bytes()
    bad.write_bytes(whole[:100] + b"\xe9" + whole[101:])
    bpe = ("--data.source", bad, "--data.tokenizer", "bpe")
    refused(capsys, f"{bad} must be UTF-8 to be split into BPE tokens; byte 100 is not", tmp_path, *SMALL, *bpe)
    main(["train", str(tmp_path / "bytes"), *SMALL, "--data.source", str(bad)])  # bytes are fine
    assert (tmp_path / "bytes" / "checkpoint.safetensors").exists()


def test_token_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ids = tmp_path / "ids.bin"
    ids.write_bytes(b"\1\0" * 500 + b"\1")
    refused(capsys, "its length of 1,001 bytes is odd", tmp_path, *SMALL, "--data.source", ids)
    ids.write_bytes(b"\1\0" * 500 + b"\7\0" + b"\1\0" * 500)
    few = ("--data.source", ids, "--data.bin-vocab-size", "7")
    message = "every id must be below the vocabulary size of 7; position 500 holds 7. Set bin_vocab_size to at least 8"
    refused(capsys, message, tmp_path, *SMALL, *few)


def test_a_context_longer_than_the_corpus(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    length = source.stat().st_size - int(source.stat().st_size * 0.9)
    options = ("--data.source", source, "--model.context", str(length))
    message = f"context must be smaller than the number of tokens in each split; it is {length} and the validation"
    refused(capsys, message, tmp_path, *options)


def test_a_device_that_is_absent(
    capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        message = f"device '{device}' is not present on this machine; choose from: auto, cpu."
        assert message in error(capsys, "train", tmp_path / "run", "--device", device)
        assert message in error(capsys, "evaluate", finished, "--device", device)
    assert not (tmp_path / "run").exists()
    assert "gpu" in error(capsys, "evaluate", finished, "--device", "gpu")


def test_unknown_names(capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path) -> None:
    assert "there is no command 'tain'; did you mean 'train'?" in error(capsys, "tain")
    said = error(capsys).replace(" ", "")
    assert all(f"{name}," in said for name in ("{train", "evaluate", "generate", "audit", "study", "task"))
    for given, meant in (("--stepz", "--steps"), ("--model.dimm", "--model.dim"), ("--datasource", "--data.source")):
        said = error(capsys, "train", tmp_path / "run", given, "3")
        assert given in said and f"{meant} " in said
    assert "--batch-size" in error(capsys, "evaluate", finished, "--batchsize", "3")
    assert "there is no preset 'dll'; did you mean 'ddl'?" in error(capsys, "train", "run", "--preset", "dll")
    rule = error(capsys, "train", tmp_path / "run", "--model.residual.rule", "delt")
    assert "'delt'" in rule and "'delta'" in rule
    assert "The run directory, made if absent" in error(capsys, "train")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--steps", "many"), "--steps"),
        (("--lr", "-1"), "lr must be greater than 0, got -1.0"),
        (("--lr", "nan"), "lr must be finite, got nan"),
        (("--model.dim", "10", "--model.heads", "3"), "dim must be a multiple of heads, got dim=10, heads=3"),
        (("--model.residual.value-channels", "1"), "one value channel has nothing to expand"),
        (("--data.validation-fraction", "1"), "validation_fraction must lie between 0 and 1, got 1"),
        (("--config", "absent.toml"), "absent.toml cannot be read: No such file or directory"),
    ],
)
def test_options_out_of_range(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    refused(capsys, message, tmp_path, *options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "[model]\ndimm = 3", "a.toml.model: unknown key 'dimm'; did you mean 'dim'?"),
        ("a.json", '{"stepz": 3}', "a.json: unknown key 'stepz'; did you mean 'steps'?"),
        ("a.toml", "steps = '3'", "a.toml: steps: Input should be a valid integer, got '3'"),
        ("a.toml", "lr = 1979-05-27", "a.toml: lr: Input should be a valid number, got '1979-05-27'"),
        ("a.toml", "lr = inf", "lr must be finite, got inf"),
        ("a.toml", "model = 3", "a.toml: model: Input should be an object, got 3"),
        ("a.toml", "steps = ", "a.toml must hold a TOML table, but is damaged"),
        ("a.json", "[1]", "a.json must hold a JSON object, got list"),
        ("a.json", "\xff", "a.json must hold a JSON object, but is damaged"),
    ],
)
def test_configuration_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refused(capsys, message, tmp_path, "--config", tmp_path / name)


def test_a_directory_with_another_run(
    capsys: pytest.CaptureFixture[str], finished: Path, source: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    write_json(tmp_path / "a.json", settings(source, steps=3, lr=0.5))
    before = {path: path.read_bytes() for path in run.iterdir()}
    said = error(capsys, "train", run, "--config", tmp_path / "a.json")
    assert "already holds a run with another configuration (lr: 0.002 there, 0.5 here)" in said
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    (tmp_path / "file").touch()
    said = error(capsys, "train", tmp_path / "file", "--config", tmp_path / "a.json")
    assert f"{tmp_path / 'file'} cannot be a folder for results: File exists. Give another run directory." in said


def test_a_truncated_checkpoint(
    capsys: pytest.CaptureFixture[str], finished: Path, source: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    checkpoint = run / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    write_json(tmp_path / "a.json", settings(source, steps=5))
    for command in (
        ("train", run, "--config", tmp_path / "a.json"),
        ("evaluate", run),
        ("generate", run, "--prompt", "a"),
    ):
        assert "checkpoint.safetensors is truncated or damaged" in error(capsys, *command)


def test_what_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (("evaluate", tmp_path), ("generate", tmp_path / "absent", "--prompt", "a")):
        assert "is not a run directory: it has no config.json" in error(capsys, *command)


def test_divergence(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", settings(source, lr=1e30, warmup=0))
    said = error(capsys, "train", tmp_path / "run", "--config", tmp_path / "a.json")
    assert "at step 4, 3 such steps in a row" in said and "output is not finite is 'stream.expansion'" in said
    assert "training diverged. The last good checkpoint is at step 0" in said
    assert "Lower lr (now 1e+30) or clip, or lengthen warmup." in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "the prompt must hold at least one token"),
        (("--prompt", "a\udcff"), "every argument must be UTF-8"),
        (("--prompt", "a", "--temperature", "-1"), "temperature must be at least 0, got -1"),
        (("--prompt", "a", "--top-k", "0"), "top_k must be at least 1, got 0"),
        ((), "--prompt"),
    ],
)
def test_generate(capsys: pytest.CaptureFixture[str], finished: Path, options: tuple[str, ...], message: str) -> None:
    assert message in error(capsys, "generate", finished, *options)


def test_evaluate(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "text.txt"
    shutil.copy(source, mine)
    quietly(config(mine, steps=2), tmp_path / "run")
    assert "batch_size must be at least 1, got 0" in error(capsys, "evaluate", tmp_path / "run", "--batch-size", "0")
    with mine.open("a") as text:
        text.write("more")
    said = error(capsys, "evaluate", tmp_path / "run")
    assert "was trained on another corpus (corpus_sha256:" in said
    mine.unlink()
    assert "there is nothing at" in error(capsys, "evaluate", tmp_path / "run")


def test_a_reader_that_goes_away_and_an_interruption(monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    for raised, code in ((BrokenPipeError, 1), (KeyboardInterrupt, 130)):

        def stop(*arguments: object, raised: type[BaseException] = raised, **options: object) -> None:
            raise raised

        monkeypatch.setattr("deepdelta.cli.runs.load", stop)
        with pytest.raises(SystemExit) as ended:
            main(["generate", str(finished), "--prompt", "a"])
        assert ended.value.code == code
    assert sys.exc_info() == (None, None, None)


@pytest.mark.parametrize(
    "command",
    [
        ("study", "quick", "--source", "SOURCE"),
        ("task", "tabular"),
        ("bench", "bar", "--quick"),
        ("bench", "gradients"),
    ],
    ids=" ".join,
)
def test_results_where_there_can_be_no_folder(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Refused before anything is run."""
    taken = tmp_path / "taken"
    taken.write_text("mine")
    arguments = [str(source) if word == "SOURCE" else word for word in command]
    assert f"{taken} cannot be a folder for results" in error(capsys, *arguments, "--out", taken)
    below = taken / "below"
    assert f"{below} cannot be a folder for results: Not a directory" in error(capsys, *arguments, "--out", below)
    assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]

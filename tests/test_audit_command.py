"""`deepdelta audit`: on trained and on imported runs, its files, its page, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from deepdelta import load
from deepdelta.cli import main
from deepdelta.config import from_plain
from deepdelta.data import load_corpus
from deepdelta.lab.audit.audit_run import spread_windows
from deepdelta.lab.audit.findings import AuditResults
from deepdelta.lab.views.audit import audit_summary, audit_tables, render_audit
from deepdelta.lab.views.tables import markdown_table, markdown_text
from deepdelta.training import RunDirectory, import_published
from report_samples import Page
from test_interop_import import byte_model, checkpoint, ids_file
from tiny_runs import config, nats, quietly, text_file

# As users run it: tyro's mark for a missing option is no Path, which the run-time type checks would refuse.
pytestmark = pytest.mark.usefixtures("unchecked")

FAST = ("--sample", "5", "--device", "cpu")
HOSTILE = 'run <b>bold<b> & "quoted"'


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    residual = {"rule": "delta", "expansion": "embedding_conv"}
    path = tmp_path_factory.mktemp("trained") / HOSTILE
    return trained(path, source, steps=30, lr=0.01, model={"residual": residual})


def trained(path: Path, source: Path, **changes: Any) -> Path:
    """A tiny run, its rewrites in plain PyTorch, which has nothing to compile."""
    quietly(config(source, **({"steps": 2, "backend": "reference"} | changes)), path)
    return path


def audited(out: Path) -> AuditResults:
    return from_plain(AuditResults, json.loads((out / "audit.json").read_text(encoding="utf-8")))


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["audit", *map(str, arguments)])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "Traceback" not in said.err
    return said.err.partition("error: ")[2]


def test_a_trained_run(capsys: pytest.CaptureFixture[str], run: Path, source: Path) -> None:
    main(["audit", str(run), "--tokens", "70", "--batch-size", "3", *FAST])
    said = capsys.readouterr()
    results = audited(run / "audit")
    written = ["audit.html", "audit.json", "operator.html", "plotly.min.js", "table.md"]
    assert sorted(path.name for path in (run / "audit").iterdir()) == written
    # Four windows of 16 tokens, evenly spread over the validation split.
    directory = RunDirectory(run)
    corpus = load_corpus(directory.config().data)
    there = (len(corpus.validation) - 1) // 16
    losses = [
        nats(load(run).model, corpus.validation[16 * i : 16 * i + 17]) for i in (n * there // 4 for n in range(4))
    ]
    found = results.findings
    assert (found.tokens, found.windows, found.window) == (64, 4, 16)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert (results.run, results.step) == (str(run), 30)
    assert results.corpus_sha256 == directory.environment()["corpus_sha256"]
    assert results.model == directory.config().model
    assert results.contexts == "4 windows of 16 tokens, evenly spread over the held-out part"
    assert results.command.startswith("deepdelta") and results.versions["torch"] and results.machine["cores"]
    assert [one.name for one in found.residuals] == ["layers.0.attention", "layers.0.mlp"]
    assert found.shortcut is not None and found.shortcut.tokens == 5
    # What is shown is what is kept.
    assert f"The loss is {found.loss:.4f} nats per token, on 64 tokens of held-out text." in said.out
    for table in audit_tables(results):
        assert table.title in said.out
        assert all(line in said.out for row in table.rows for cell in row for line in cell.split("\n"))
    assert f"{found.residuals[1].effects[3].loss_change:+.4f}" in said.out
    total = 4 * (1 + 5 * 3)
    assert f"Auditing {run} {total}/{total}" in " ".join(said.err.split())


def test_the_page(run: Path, tmp_path: Path) -> None:
    main(["audit", str(run), "--tokens", "70", "--out", str(tmp_path / "new" / "out"), *FAST])
    results = audited(tmp_path / "new" / "out")
    text = (tmp_path / "new" / "out" / "audit.html").read_text(encoding="utf-8")
    assert text == render_audit(results), "the page comes from the JSON alone"
    written = (tmp_path / "new" / "out" / "table.md").read_text(encoding="utf-8")
    assert all(markdown_table(table) in written for table in audit_tables(results))
    assert all(markdown_text(sentence) in written for sentence in audit_summary(results))
    assert markdown_text(results.facts(results.finished)) in written and "<b>bold" not in written
    page = Page(text)
    assert page.loads == ["script src=plotly.min.js"]
    assert page.policy.startswith("default-src 'none'") and "connect-src" not in page.policy
    assert HOSTILE in page.visible and "<b>bold" not in text.replace("&lt;b&gt;", "")
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.data) == {"gates", "regimes", "discrepancies", "cosines", "shares", "eigenvalues", "smallest"} | {
        "rank",
        *(f"effect-{n}" for n in range(5)),
    }
    for figure in page.data.values():
        go.Figure(figure)  # raises on any property that plotly.js does not know
    for value in (results.command, results.commit or "", results.corpus, results.corpus_sha256, results.contexts):
        assert " ".join(value.split()) in page.visible
    for number, table in enumerate(audit_tables(results), 1):
        expected = [[column.title for column in table.columns], *map(list, table.rows)]
        assert page.rows[f"audit-{number}"] == expected


def test_the_pictures_draw_the_findings(run: Path, tmp_path: Path) -> None:
    main(["audit", str(run), "--tokens", "70", "--out", str(tmp_path), *FAST])
    results = audited(tmp_path)
    found, data = results.findings, Page(render_audit(results)).data
    rows = ["0 attention", "0 mlp"]
    heat, means = data["gates"]["data"]
    assert heat["y"] == rows and [sum(row) for row in heat["z"]] == pytest.approx([1, 1])
    assert means["x"] == [one.gate.values.mean for one in found.residuals]
    bars = {bar["name"]: bar["x"] for bar in data["regimes"]["data"]}
    assert bars["project"] == [one.gate.regimes.project for one in found.residuals]
    assert [sum(column) for column in zip(*bars.values(), strict=True)] == pytest.approx([1, 1])
    _, before, after = data["discrepancies"]["data"]
    assert before["x"] == [one.discrepancy.rms_before for one in found.residuals]
    assert after["x"] == [one.discrepancy.rms_after for one in found.residuals]
    (box,) = data["cosines"]["data"]
    assert (box["y"], box["q1"]) == (rows, [one.cosine.q25 for one in found.residuals])
    shares = {trace["name"]: trace["x"] for trace in data["shares"]["data"]}
    assert shares["erased"] == [one.erased for one in found.residuals]
    assert shares["written"] == [one.written for one in found.residuals]
    (cloud,) = data["eigenvalues"]["data"]
    assert list(zip(cloud["x"], cloud["y"], strict=True)) == list(found.shortcut.eigenvalues)
    assert data["rank"]["data"][0]["x"] == [one.effective_rank for one in found.shortcut.depth]
    for number in range(5):
        (trace,) = data[f"effect-{number}"]["data"]
        effects = [one.effects[number] for one in found.residuals]
        assert trace["x"] == [effect.loss_change for effect in effects] and trace["y"] == rows
        assert trace["error_x"]["array"] == [effect.change.t_interval.high - effect.change.mean for effect in effects]


@pytest.mark.parametrize("rule", ["write_only", "additive", "two_gate"])
def test_rules_without_some_parts(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, rule: str) -> None:
    residual = {"rule": rule, "value_channels": 2, "expansion": "repeat"}
    trained(tmp_path / "run", source, model={"residual": residual})
    main(["audit", str(tmp_path / "run"), "--tokens", "48", *FAST])
    said = " ".join(capsys.readouterr().out.split())
    data = Page((tmp_path / "run" / "audit" / "audit.html").read_text(encoding="utf-8")).data
    assert ("gates" in data, "erase-gates" in data) == (rule != "additive", rule == "two_gate")
    assert ("eigenvalues" in data, "discrepancies" in data) == (rule == "two_gate", rule == "write_only")
    assert {key for key in data if key.startswith("effect-")} == {
        "write_only": {"effect-0", "effect-1", "effect-2", "effect-4"},
        "additive": {"effect-4"},
        "two_gate": {f"effect-{n}" for n in range(5)},
    }[rule]
    assert ("Composed shortcut" in said) == (rule == "two_gate")
    assert ("No 'erase cut': the rule" in said) == (rule != "two_gate")
    assert ("The gate that is set is that of the erase." in said) == (rule == "two_gate")
    for figure in data.values():
        go.Figure(figure)


@pytest.mark.parametrize("name", ["cc-ec", "scalar", "aside-token-kernel-3"])
def test_an_imported_checkpoint(tmp_path: Path, name: str) -> None:
    """Without a corpus of its own it takes one by --source; with one, both ways give the same numbers."""
    size = {"aside-token-kernel-3": 31}.get(name, 97)
    ids = ids_file(tmp_path / "ids.bin", size)
    folder = checkpoint(tmp_path / "published", name)
    main(["import", str(folder), "--run", str(tmp_path / "bare")])
    main(["import", str(folder), "--run", str(tmp_path / "fed"), "--source", str(ids)])
    main(["audit", str(tmp_path / "bare"), "--source", str(ids), "--tokens", "128", *FAST])
    main(["audit", str(tmp_path / "fed"), "--tokens", "128", *FAST])
    bare, fed = audited(tmp_path / "bare" / "audit"), audited(tmp_path / "fed" / "audit")
    assert bare.findings == fed.findings and bare.step == 0
    assert bare.corpus_sha256 == fed.corpus_sha256
    held = np.fromfile(ids, "<u2")[1350:]
    context = fed.model.context
    there = 149 // context
    losses = [nats(load(tmp_path / "bare").model, held[i * context : (i + 1) * context + 1]) for i in range(there)]
    assert bare.findings.windows == there
    assert bare.findings.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(bare.findings.residuals) == 2 * fed.model.layers


def test_a_text_for_an_imported_byte_model(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    byte_model(tmp_path / "bytes")
    import_published(tmp_path / "bytes", tmp_path / "run", None)
    main(["audit", str(tmp_path / "run"), "--source", str(source), "--tokens", "32", *FAST])
    assert "of 256 ids" in audited(tmp_path / "run" / "audit").corpus


def test_another_text_in_the_ids_of_the_run(source: Path, tmp_path: Path) -> None:
    """A run with a BPE reads the other text with its own."""
    data = {"source": str(source), "tokenizer": "bpe", "bpe_vocab_size": 300}
    trained(tmp_path / "run", source, data=data)
    other = tmp_path / "other.txt"
    other.write_text(source.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    main(["audit", str(tmp_path / "run"), "--source", str(other), "--tokens", "32", *FAST])
    results = audited(tmp_path / "run" / "audit")
    assert "of 300 ids" in results.corpus
    assert results.corpus_sha256 != RunDirectory(tmp_path / "run").environment()["corpus_sha256"]


def test_texts_that_cannot_be_put_into_ids(
    capsys: pytest.CaptureFixture[str], run: Path, source: Path, tmp_path: Path
) -> None:
    import_published(checkpoint(tmp_path / "published"), tmp_path / "bare", None)
    bare = tmp_path / "bare"
    assert error(capsys, bare) == f"{bare} was imported without a corpus; give the text to audit it on by --source.\n"
    said = error(capsys, bare, "--source", source)
    assert f"{bare} keeps no tokenizer, so text cannot be turned into the 97 ids of its model" in said
    assert "by --tokenizer, or ids instead of text (a .bin file) by --source" in said
    said = error(capsys, bare, "--source", source, "--tokenizer", "bytes")
    assert f"the tokenizer has 256 ids, the model of {bare} only 97" in said
    said = error(capsys, bare, "--source", source, "--tokenizer", "bpe")
    assert "--tokenizer must be the one that the model was trained with, not a new BPE" in said
    said = error(capsys, bare, "--source", source, "--tokenizer", "absent.json")
    assert "there is no file 'absent.json'" in said
    said = error(capsys, bare, "--source", ids_file(tmp_path / "ids.bin", 300))
    assert "every id must be below the vocabulary size of 97" in said
    assert "--tokenizer belongs to the text of --source" in error(capsys, run, "--tokenizer", "bytes")
    said = error(capsys, run, "--source", source, "--tokenizer", "bytes")
    assert "keeps the tokenizer of its model; leave --tokenizer out" in said
    assert not (bare / "audit").exists()


def test_bad_input(capsys: pytest.CaptureFixture[str], run: Path, source: Path, tmp_path: Path) -> None:
    assert error(capsys, tmp_path) == f"{tmp_path} is not a run directory: it has no config.json.\n"
    assert list(tmp_path.iterdir()) == []
    said = error(capsys, run, "--tokens", "15")
    assert said == "tokens must be at least the model's context of 16, for one window; got 15.\n"
    (tmp_path / "short.txt").write_text("x" * 160)
    said = error(capsys, run, "--source", tmp_path / "short.txt")
    assert "must hold more tokens than the model's context of 16, it has 16; give more text by --source" in said
    assert "there is nothing at 'absent'" in error(capsys, run, "--source", "absent")
    (tmp_path / "file").touch()
    said = error(capsys, run, "--out", tmp_path / "file")
    assert f"{tmp_path / 'file'} cannot be a folder for results: File exists. Give another --out." in said
    for option in ("--sample", "--batch-size"):
        said = error(capsys, run, option, "0", "--out", tmp_path / "out")
        assert f"{option[2:].replace('-', '_')} must be at least 1, got 0" in said


def test_a_corpus_that_has_changed(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(source.read_bytes())
    trained(tmp_path / "run", copy)
    copy.write_bytes(source.read_bytes() + b"and more")
    assert "was trained on another corpus" in error(capsys, tmp_path / "run")


def test_windows_are_whole_spread_and_apart() -> None:
    split = np.arange(107, dtype=np.uint8)
    for tokens, starts in ((10, [0]), (39, [0, 30, 60]), (1000, [10 * i for i in range(10)])):
        found = spread_windows(split, 10, tokens)
        assert found.tolist() == [list(range(start, start + 11)) for start in starts]


def test_a_report_of_a_study_names_the_command() -> None:
    from deepdelta.lab.views.page import render_page
    from report_samples import study

    assert "deepdelta audit RUN" in Page(render_page(study())).visible

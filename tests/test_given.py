"""What users hand over: paths as text or as paths, ids as lists, tensors or arrays."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

import deepdelta
from deepdelta import GPT, GPTConfig, UserError, generate
from deepdelta.data import ByteTokenizer, load_corpus, load_tokenizer
from deepdelta.decoding import DecodingCache
from deepdelta.lab.analysis.results import load_results
from deepdelta.lab.bench import load_results as load_timings
from deepdelta.lab.views import write_report
from deepdelta.training import RunDirectory, train
from tiny_runs import assert_same_run, config, quietly, text_file

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "interop", "lab.bench", "lab.views", "retrofitting", "training")
INNER = ("lab.analysis.results", "lab.audit.audit_run", "lab.runner", "lab.tasks.runner")


def public_functions() -> Iterator[Any]:
    """Of the package and its folders; of modules without a list, those that load or run something."""
    for name in ("deepdelta", *(f"deepdelta.{folder}" for folder in (*FOLDERS, *INNER))):
        module = importlib.import_module(name)
        names = getattr(module, "__all__", None) or [key for key in vars(module) if key.startswith(("load_", "run"))]
        for value in (getattr(module, key) for key in names):
            if inspect.isfunction(value):
                yield value
            elif inspect.isclass(value):
                yield from (part for key, part in vars(value).items() if inspect.isfunction(part) and key[0] != "_")


def test_no_public_function_insists_on_a_path() -> None:
    functions = [inspect.unwrap(function) for function in public_functions()]
    assert len(functions) > 60
    for function in functions:
        for name, kind in get_type_hints(function).items():
            if name != "return" and Path in (kind, *get_args(kind)):
                assert str in get_args(kind), f"{function.__module__}.{function.__qualname__}: {name}"


def test_runs_by_text(tmp_path: Path) -> None:
    settings = config(text_file(tmp_path / "text.txt"), steps=2)
    quietly(settings, tmp_path / "one")
    assert train(settings, str(tmp_path / "two"), say=lambda line: None).finished
    assert_same_run(tmp_path / "one", tmp_path / "two")
    again = train(settings, f"{tmp_path}/three", init_from=f"{tmp_path}/one", say=lambda line: None)
    assert again.finished and deepdelta.load(f"{tmp_path}/three").tokenizer is not None
    assert RunDirectory(f"{tmp_path}/one") == RunDirectory(tmp_path / "one")
    corpora = [load_corpus(settings.data, cache=kind(tmp_path / "cache")) for kind in (str, Path)]
    assert corpora[0].sha256 == corpora[1].sha256
    ByteTokenizer().save(str(tmp_path))
    assert load_tokenizer(str(tmp_path)) is not None


def test_results_by_text(tmp_path: Path) -> None:
    results = load_results(str(ROOT / "results/quick/results.json"))
    assert results == load_results(ROOT / "results/quick/results.json")
    assert load_timings(str(ROOT / "results/bench-bar/results.json")).suite
    write_report(results, str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").stat().st_size > 10000


FORMS = [
    tuple,
    torch.tensor,
    np.array,
    lambda ids: torch.tensor([ids], dtype=torch.int32),
    lambda ids: list(map(torch.tensor, ids)),
]


@pytest.mark.parametrize("form", FORMS)
def test_ids_in_any_form(form: Any, unchecked: None) -> None:
    model = GPT(GPTConfig(vocab_size=11, dim=8, heads=2, layers=1, context=8))
    ids = [3, 1, 7]
    assert list(generate(model, form(ids), tokens=6, seed=1)) == list(generate(model, ids, tokens=6, seed=1))
    assert ByteTokenizer().decode(form([104, 105])) == "hi"
    prompts = torch.tensor([[0, 5], [4, 5]])
    paddings = [DecodingCache(model, 2, padding).decode(prompts) for padding in (form([1, 0]), [1, 0])]
    assert torch.equal(*paddings)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), r"the prompt must be one row of ids, got shape \(2, 3\)"),
        (torch.tensor(3), r"the prompt must be one row of ids, got shape \(\)"),
        (torch.tensor([0.5, 1.0]), r"the prompt must be whole numbers, got \[0.5, 1.0\]"),
        ("text", "the prompt must be whole numbers, got 'text'; a tokenizer makes ids of text"),
        (torch.zeros(0, dtype=torch.long), "the prompt must hold at least one token"),
        (np.array([3, -4]), r"ids must lie in \[0, 11\), got -4"),
    ],
    ids=str,
)
def test_what_is_no_row_of_ids(prompt: Any, message: str, unchecked: None) -> None:
    model = GPT(GPTConfig(vocab_size=11, dim=8, heads=2, layers=1, context=8))
    with pytest.raises(UserError, match=message):
        generate(model, prompt, tokens=1)

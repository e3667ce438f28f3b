"""A run's model in other programs: for transformers with its tokenizer, as bare safetensors, as the authors have it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepdelta.hf  # the Auto classes know the model then
from deepdelta import GPT, PRESETS, GPTConfig, UserError, generate, load
from deepdelta.cli import main
from deepdelta.config import from_plain, to_plain
from deepdelta.exporting import export
from deepdelta.files import read_plain
from deepdelta.interop import load_published, read_published
from tiny_runs import config, quietly, text_file

pytestmark = pytest.mark.usefixtures("unchecked")
TEXTS = [
    "def f(x):\n    return x  # \N{EURO SIGN}",
    "",
    " two  spaces\tand \x01\x7f",
    "a <|endoftext|> b",
    "Āé\N{GRINNING FACE}",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("source") / "text.txt")


@pytest.fixture(scope="module")
def runs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, dict[str, Any]] = {
        "bytes": {"model": {"residual": to_plain(PRESETS["code-tc"])}},
        "bpe": {
            "data": {"source": str(source), "tokenizer": "bpe", "bpe_vocab_size": 280},
            "model": {"vocab_size": 288},
        },
    }
    for name, changes in kinds.items():
        quietly(config(source, steps=3, warmup=1, **changes), folder / name)
    return {name: folder / name for name in kinds}


@pytest.mark.compatible("a run exported, AutoTokenizer and generate with left padding", "transformers", "tokenizers")
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_for_transformers(runs, name, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    main(["export", str(runs[name]), "--to", "hf", "--out", str(out)])
    assert f"{out} holds the model of {runs[name]}." in capsys.readouterr().out
    gpt, tokenizer = load(runs[name])
    model, theirs = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    deepdelta.use_backend(gpt, "reference")
    deepdelta.use_backend(model, "reference")
    for text in TEXTS:
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.separator == model.generation_config.eos_token_id
    assert theirs("a<|endoftext|>")["input_ids"][-1] == tokenizer.separator
    prompts = ["def ", "return x"]
    inputs = theirs(prompts, return_tensors="pt", padding=True)
    assert inputs["attention_mask"].sum(1).tolist() == [len(tokenizer.encode(prompt)) for prompt in prompts]
    drawn = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for prompt, ids in zip(prompts, drawn[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        expected = list(
            generate(gpt, tokenizer.encode(prompt), tokens=6, temperature=0, vocab_size=tokenizer.vocab_size)
        )
        if tokenizer.separator in expected:
            expected = expected[: expected.index(tokenizer.separator) + 1]
        assert ids[: len(expected)] == expected
    rows = gpt.embedding.weight.shape[0]
    unused = model.generation_config.suppress_tokens or []
    assert unused == list(range(tokenizer.vocab_size, rows)) and (name == "bytes") == (not unused)


@pytest.mark.compatible("an export without deepdelta (trust_remote_code)", "transformers")
def test_for_transformers_without_the_library(runs, tmp_path):
    """Code of the export's own, in a process that cannot import deepdelta nor what it needs besides."""
    export(runs["bytes"], "hf", tmp_path / "out")
    gpt, ids = load(runs["bytes"]).model, torch.tensor([[1, 2, 3, 4, 5]])
    deepdelta.use_backend(gpt, "reference")
    drawn = list(generate(gpt, ids, tokens=6, temperature=0.0))
    torch.save({"logits": gpt(ids).logits, "ids": ids, "drawn": drawn}, tmp_path / "told.pt")
    code = f"""
import sys
for name in ("deepdelta", "jaxtyping", "pydantic", "annotated_types", "numba", "rich", "tyro"):
    sys.modules[name] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
told = torch.load({str(tmp_path / "told.pt")!r})
folder = {str(tmp_path / "out")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert model(told["ids"]).logits.equal(told["logits"])
ids = model.generate(told["ids"], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 5:].tolist()
assert ids == told["drawn"], ids
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert again(told["ids"]).logits.equal(told["logits"])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(type(model).__module__.split(".")[0], tokenizer("ab")["input_ids"])
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "transformers_modules [97, 98]\n", done.stderr


def test_as_safetensors(runs, tmp_path):
    export(str(runs["bpe"]), "safetensors", str(tmp_path / "out"))
    model = GPT(from_plain(GPTConfig, read_plain(tmp_path / "out" / "config.json", "")))
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    ours = load(runs["bpe"]).model.state_dict()
    assert all(tensor.equal(ours[name]) for name, tensor in model.state_dict().items())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (runs["bpe"] / "tokenizer.json").read_bytes()


def test_as_the_authors_have_it(runs, tmp_path):
    (tmp_path / "out").mkdir()
    main(["export", str(runs["bytes"]), "--to", "authors", "--out", str(tmp_path / "out")])
    model, back = load(runs["bytes"]).model, load_published(*read_published(tmp_path / "out"))
    ids = torch.arange(12)[None]
    assert back(ids).logits.equal(model(ids).logits)
    assert back.config.residual.compression == "token" and back.config.context == model.config.context


def test_refusals(runs, tmp_path, capsys):
    with pytest.raises(UserError, match="the published code has no rule='additive_erase'"):
        export(runs["bpe"], "authors", tmp_path / "out")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be a new or empty folder"):
        export(runs["bpe"], "hf", tmp_path)
    with pytest.raises(UserError, match="there is no export 'hff'; did you mean 'hf'"):
        export(runs["bpe"], "hff", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), "--to", "safetensors", "--out", str(tmp_path / "out")])
    assert "is not a run directory" in capsys.readouterr().err

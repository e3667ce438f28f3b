"""One way through all: a parquet file, training, transformers, LoRA; and on to lm-eval, a server, onnxruntime."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepdelta import generate_batch, load
from deepdelta.cli import main
from deepdelta.exporting import export
from tiny_runs import WORDS, config, quietly

pytestmark = pytest.mark.usefixtures("unchecked")
PROMPTS = ["def return", "r", "gate state"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("scenario")
    documents = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(30)) for i in range(1, 40)]
    pyarrow.parquet.write_table(pyarrow.table({"body": documents}), folder / "documents.parquet")
    model = {"context": 48, "dim": 16, "layers": 2}
    settings = config(folder / "documents.parquet", steps=30, lr=0.01, model=model, data={"field": "body"})
    quietly(settings, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return export(run, "hf", run.parent / "hf")


def drawn(run: Path, tokens: int = 8) -> list[list[int]]:
    """What the run's model goes on with, greedily."""
    model = load(run).model
    steps = generate_batch(model, [list(one.encode()) for one in PROMPTS], tokens=tokens, temperature=0.0)
    return [list(row) for row in zip(*steps, strict=True)]  # type: ignore[arg-type]


FRESH = """
import json, sys
import deepdelta.hf
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, *prompts = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
given = tokenizer(prompts, return_tensors="pt", padding=True)
found = []
for cached in (True, False):
    ids = model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=cached)
    found.append(ids[:, given["input_ids"].shape[1]:].tolist())
print(json.dumps(found))
"""


@pytest.mark.compatible(
    "parquet, train, export, Auto classes in a fresh process, padded batches", "transformers", "pyarrow"
)
def test_from_a_table_to_a_fresh_process(run: Path, exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, str(exported), *PROMPTS],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [drawn(run)] * 2, done.stderr


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.tensor(list(b"gate write erase state"[i : i + 12]))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.compatible("an export fine-tuned by Trainer and LoRA", "transformers", "peft")
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_an_export_is_fine_tuned(exported: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    import deepdelta.hf

    class DeltaTrainer(deepdelta.hf.DeltaDecay, Trainer):  # type: ignore[misc]
        pass

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(model.eval()(**{k: v[None] for k, v in Rows()[0].items()}).loss)

    for adapted in (False, True):
        model = AutoModelForCausalLM.from_pretrained(exported)
        before = loss(model)
        if adapted:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, learning_rate=3e-2, report_to=[], use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, save_strategy="no", per_device_train_batch_size=4,
        )  # fmt: skip
        DeltaTrainer(model=model, args=arguments, train_dataset=Rows()).train()
        assert loss(model) < before - 0.005


@pytest.mark.home
@pytest.mark.compatible("the same run in lm-eval's tasks", "lm-eval")
def test_on_to_the_tasks(run: Path) -> None:
    from deepdelta.harness import read_results

    main(["evaluate", str(run), "--tasks", "deepdelta_words", "deepdelta_prose", "--limit", "4"])
    words, prose = read_results(run)
    assert words.questions == 4 and 0 <= words.metrics["acc"] <= 1 and 2 < prose.metrics["bits_per_byte"] < 12


@pytest.mark.home
@pytest.mark.compatible("the same run in onnxruntime: the same tokens", "onnxruntime")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_on_to_onnxruntime(run: Path, tmp_path: Path) -> None:
    from test_exported import by_onnxruntime

    main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "onnx")])
    prompts = [list(one.encode()) for one in PROMPTS]
    assert by_onnxruntime(tmp_path / "onnx" / "model.onnx", prompts, 8, 256) == drawn(run)


@pytest.fixture
def server(exported: Path, tmp_path: Path) -> Iterator[str]:
    """`transformers serve` of the export, in a process that knows its class; its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    serve = "import deepdelta.hf; from transformers.cli.transformers import main; main()"
    options = ("--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", serve, "serve", str(exported), *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        )
        try:
            for _ in range(1200):
                assert process.poll() is None, (tmp_path / "log").read_text()
                with socket.socket() as one:
                    if one.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.25)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.home
@pytest.mark.compatible(
    "transformers serve, asked by the openai client", "transformers", "openai", "fastapi", "uvicorn"
)
def test_on_to_a_server(run: Path, exported: Path, server: str) -> None:
    import openai

    with openai.OpenAI(base_url=server, api_key="none", timeout=300) as client:
        answer = client.completions.create(model=str(exported), prompt=PROMPTS[0], max_tokens=8, temperature=0)
    text = bytes(drawn(run)[0]).decode(errors="replace")
    assert answer.choices[0].text == text

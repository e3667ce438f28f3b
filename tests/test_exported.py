"""Programs without this package: torch.export and ONNX of prefill and cached decoding, int8 weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, PRESETS, GPTConfig, generate_batch, load
from deepdelta.cli import main
from deepdelta.config import to_plain
from deepdelta.data import load_corpus
from deepdelta.exporting.decoder import Decoder, Kept, exported_program
from deepdelta.training import RunDirectory
from helpers import perturb
from tiny_runs import config, nats, quietly, text_file

pytestmark = pytest.mark.usefixtures("unchecked")
PADDED = torch.tensor([[0, 0, 3, 4], [1, 2, 3, 4], [0, 0, 0, 5]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])


def small(preset: str) -> GPT:
    model = GPT(GPTConfig(vocab_size=13, dim=12, heads=2, layers=2, context=16, residual=PRESETS[preset]), seed=3)
    perturb(model)
    return model.eval()


def steps(call: Any, kept: Kept, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    """The logits of ids that are fed in pieces."""
    found, rest = [], [ids.shape[1] - sum(cuts)]
    for new, seen in zip(ids.split(cuts + rest, 1), mask.split(cuts + rest, 1), strict=True):
        logits, kept = call(new, seen, kept)
        found.append(logits)
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_the_decoder_gives_the_logits_of_the_model(preset):
    model = small(preset)
    decoder, ids = Decoder(model), torch.randint(13, (2, 7), generator=torch.Generator().manual_seed(0))
    for cuts in ([], [1, 1], [3], [5, 1]):
        fed = steps(decoder, decoder.nothing(2), ids, torch.ones_like(ids), cuts)
        torch.testing.assert_close(fed, model(ids).logits, rtol=1e-4, atol=1e-5)
    fed = steps(decoder, decoder.nothing(3), PADDED, MASK, [2, 1])
    for row, ids_T, mask_T in zip(fed, PADDED, MASK, strict=True):
        alone = model(ids_T[mask_T.bool()][None]).logits[0]
        torch.testing.assert_close(row[mask_T.bool()], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.compatible("torch.export: one program for prefill and cached decoding, any batch and length", "torch")
@pytest.mark.parametrize("preset", ["ddl", "code-tc", pytest.param("paper-cc", marks=pytest.mark.scale)])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_an_exported_program_takes_every_size(preset):
    model = small(preset)
    program, decoder = exported_program(model).module(), Decoder(model)
    for batch, tokens, cuts in ((1, 1, []), (1, 6, []), (3, 5, [1, 1, 2]), (2, 9, [4])):
        ids = torch.randint(13, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
        fed = steps(program, decoder.nothing(batch), ids, torch.ones_like(ids), cuts)
        torch.testing.assert_close(fed, model(ids).logits, rtol=1e-4, atol=1e-5)
    fed = steps(program, decoder.nothing(3), PADDED, MASK, [])
    torch.testing.assert_close(fed, decoder(PADDED, MASK, decoder.nothing(3))[0], rtol=1e-4, atol=1e-5)


def by_onnxruntime(file: Path, prompts: list[list[int]], tokens: int, vocabulary: int) -> list[list[int]]:
    """Greedy continuations of prompts of different lengths, with nothing but numpy and onnxruntime."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    sizes = {"batch": len(prompts), "earlier": 0}
    kept = {
        one.name: np.zeros([sizes.get(size, size) for size in one.shape], kinds[one.type])
        for one in session.get_inputs()[2:]
    }
    drawn = []
    for _ in range(tokens):
        logits, *after = session.run(None, {"input_ids": ids, "attention_mask": mask, **kept})
        kept = dict(zip(kept, after, strict=True))
        ids = logits[:, -1:, :vocabulary].argmax(-1)
        mask = np.ones_like(ids)
        drawn.append(ids[:, 0].tolist())
    return [list(row) for row in zip(*drawn, strict=True)]


@pytest.mark.home
@pytest.mark.compatible(
    "deepdelta export --to onnx: the same tokens in onnxruntime", "onnx", "onnxscript", "onnxruntime"
)
@pytest.mark.parametrize("preset", ["ddl", "code-tc", "paper-cc"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_onnx_file_decodes_the_same_tokens(preset, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    model = {"context": 32, "layers": 2, "residual": to_plain(PRESETS[preset])}
    settings = config(text_file(tmp_path / "text.txt"), steps=20, lr=0.02, backend="reference", model=model)
    quietly(settings, run)
    main(["export", str(run), "--to", "onnx", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir())[:1] == ["config.json"] and (out / "tokenizer.json").exists()
    prompts = [list(b"def "), list(b"r"), list(b"gate state")]
    expected = list(generate_batch(load(run).model, prompts, tokens=12, temperature=0.0))
    assert by_onnxruntime(out / "model.onnx", prompts, 12, 256) == [list(row) for row in zip(*expected, strict=True)]


@pytest.mark.home
@pytest.mark.compatible("int8 weights in an export, the change of the loss measured", "torchao", "transformers")
def test_int8_weights_and_what_they_change(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    import deepdelta.hf  # the Auto classes know the model then

    assert deepdelta.hf
    run, out = tmp_path / "run", tmp_path / "out"
    quietly(config(text_file(tmp_path / "text.txt"), steps=20, lr=0.02, backend="reference"), run)
    main(["export", str(run), "--to", "hf", "--weights", "int8", "--out", str(out)])
    told = json.loads((out / "quantization.json").read_text())
    assert f"Loss {told['loss_before']:.4f} as trained, {told['loss_after']:.4f} with int8" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    changed = {name.rpartition(".")[0] for name, one in model.named_parameters() if type(one) is not torch.nn.Parameter}
    maps = [name for name, one in model.model.named_modules() if type(one) is torch.nn.Linear]
    assert len(maps) == 7 and changed == {f"model.{name}" for name in maps}
    ids = load_corpus(RunDirectory(run).config().data).validation
    for loaded, loss in ((load(run).model, told["loss_before"]), (model.model.gpt, told["loss_after"])):
        losses = nats(loaded, ids)
        assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert 1e-7 < abs(told["loss_after"] - told["loss_before"]) < 0.02
    for words, message in (
        (("--to", "hf", "--weights", "int4"), "int4 weights need a kernel that torchao"),
        (("--to", "onnx", "--weights", "int8"), "weights='int8' is for the export 'hf', got 'onnx'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", str(run), *words, "--out", str(tmp_path / "other")])
        assert ended.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "other").exists()

"""An export for transformers with weights of 8 bits, and what that does to the loss."""

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepdelta.data import Tokenizer, load_corpus
from deepdelta.errors import UserError, require
from deepdelta.exporting import Quantised
from deepdelta.files import write_json
from deepdelta.hf.export import export_hf
from deepdelta.hf.flat import AUTO_MAP
from deepdelta.models import GPT
from deepdelta.training import RunDirectory, evaluate
from deepdelta.training.loop import corpus_facts

FILE_NAME = "quantization.json"
TOKENS = 65536
"""Of the validation split that the change of the loss is measured on, at most."""


def export_quantized(
    model: GPT, tokenizer: Tokenizer | None, run: RunDirectory, folder: Path, weights: Quantised
) -> None:
    """What `export_hf` writes, with the maps of attention and MLP as int8 with a scale per output, by torchao.

    Gates, targets, norms and the embedding, which is the head too, stay as they are. `quantization.json` holds the loss
    before and after on up to 65,536 tokens of the run's validation split.

    Raises:
        UserError: int4; the extra `export` is missing; the run has no corpus to measure on.
    """
    require("Quantised weights", "export", "torchao")
    if weights == "int4":
        raise UserError(
            f"int4 weights need a kernel that torchao {version('torchao')} has for CUDA alone, not for the CPU; take "
            "--weights int8."
        )
    if run.environment()["corpus_sha256"] is None:
        raise UserError(f"{run.path} has no corpus to measure the change of the loss on; import it with --source.")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    corpus = load_corpus(run.config().data)
    run.check_environment(corpus_facts(corpus), exact=False)
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        plain.mkdir()
        export_hf(model, tokenizer, plain)
        kept = [
            name for name, one in model.named_modules() if isinstance(one, nn.Linear) and type(one) is not nn.Linear
        ]
        settings = TorchAoConfig(
            Int8WeightOnlyConfig(), modules_to_not_convert=[*(f"model.gpt.{name}" for name in kept), "lm_head"]
        )
        quantised: Any = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings)
        quantised.config.auto_map = AUTO_MAP
        quantised.save_pretrained(folder)
        for file in plain.iterdir():
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    options: dict[str, Any] = {"batch_size": 8, "device": torch.device("cpu"), "tokens": TOKENS}
    before, after = evaluate(model, corpus, **options), evaluate(quantised.model.gpt, corpus, **options)
    about = {"weights": weights, "loss_before": before.loss, "loss_after": after.loss, "tokens": before.tokens}
    write_json(folder / FILE_NAME, about | {"torchao": version("torchao")})

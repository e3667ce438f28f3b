"""`deepdelta import`: from a folder with a published checkpoint to a run that the other commands take."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import deepdelta
from checkpoints import checkpoint, refused
from deepdelta import GPT, PRESETS, GPTConfig
from deepdelta.cli import main
from deepdelta.data import DataConfig, batch, load_corpus
from deepdelta.interop import load_published, to_published
from deepdelta.interop.checkpoint import WEIGHTS
from deepdelta.training import import_published
from test_oracle import vector
from tiny_runs import rows


def ids_file(path: Path, vocab_size: int, count: int = 1500) -> Path:
    np.random.default_rng(0).integers(0, vocab_size, count).astype("<u2").tofile(path)
    return path


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_run_that_loads_as_the_published_model(tmp_path, capsys, weights):
    folder = checkpoint(tmp_path / "published", weights=weights)
    main(["import", str(folder), "--run", str(tmp_path / "run")])
    given = vector("cc-ec")
    expected = load_published(given.config, given.parameters)
    count = sum(parameter.numel() for parameter in expected.parameters())
    assert f"holds the published model: {count:,} parameters" in capsys.readouterr().out
    loaded = deepdelta.load(tmp_path / "run")
    assert loaded.tokenizer is None and not loaded.model.training and loaded.model.config == expected.config
    state = expected.state_dict()
    assert loaded.model.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[key]) for key, tensor in loaded.model.state_dict().items())
    assert to_published(loaded.model).keys() == given.parameters.keys()
    by_text = import_published(str(folder), str(tmp_path / "by text"), None)
    assert all(tensor.equal(state[key]) for key, tensor in by_text.state_dict().items())
    assert deepdelta.load(str(tmp_path / "by text")).model.config == expected.config


def test_the_keys_that_transformers_writes_are_taken(tmp_path):
    """What `save_pretrained` of the published classes leaves in config.json, bookkeeping included."""
    folder = checkpoint(tmp_path / "published")
    keys = json.loads((folder / "config.json").read_text())
    keys |= {
        "architectures": ["GPT"],
        "bias": False,
        "ddl_beta_hidden_size": 128,
        "ddl_beta_init": 1.0,
        "ddl_beta_single_linear": True,
        "ddl_k_eps": 1e-05,
        "ddl_state_dv_shortconv_causal": False,
        "ddl_state_read_init": None,
        "ddl_state_shortconv_kernel_size": 4,
        "ddl_v_constant": False,
        "ddl_v_constant_value": 2.0,
        "ddl_v_sigmoid": True,
        "ddl_v_sigmoid_scale": 4.0,
        "ddl_value_channels": 4,
        "dropout": 0.0,
        "dtype": "float32",
        "embedding_init_std": 0.02,
        "hidden_init_std_factor": 0.5,
        "input_embed_shortconv_kernel_size": 4,
        "k_activation": None,
        "model_type": "nanogpt-pro",
        "q_activation": None,
        "rope_ratio": 1.0,
        "scale_attn_by_inverse_layer_idx": False,
        "transformers_version": "4.57.3",
        "use_k_shift": False,
        "use_output_gate": False,
        "use_qk_rmsnorm": True,
        "use_v_shift": False,
        "using_groupnorm": False,
        "v_activation": None,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    given = vector("cc-ec")
    model = import_published(folder, tmp_path / "run", None)
    assert model.config == load_published(given.config, given.parameters).config


def test_evaluating_on_bare_ids(tmp_path, capsys):
    """The loss over every validation token, window by window, recomputed from the published tensors."""
    source = ids_file(tmp_path / "ids.bin", 97)
    main(["import", str(checkpoint(tmp_path / "cc")), "--run", str(tmp_path / "run"), "--source", str(source)])
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--device", "cpu"])
    printed = capsys.readouterr().out
    given = vector("cc-ec")
    model = load_published(given.config, given.parameters)
    held = torch.from_numpy(np.fromfile(source, "<u2").astype(np.int64))[1350:]
    losses = []
    for start in range(0, len(held) - 1, 64):
        piece = held[start : start + 65]
        losses.append(F.cross_entropy(model(piece[None, :-1]).logits[0], piece[1:], reduction="none"))
    assert f"loss            {torch.cat(losses).mean():.4f} nats per token" in printed
    assert "on 149 tokens, the whole validation split" in printed and "bits per byte" not in printed


def test_ids_beyond_the_model_are_refused(tmp_path, capsys):
    folder = checkpoint(tmp_path / "cc")
    source = ids_file(tmp_path / "ids.bin", 300)
    message = refused(capsys, "import", folder, "--run", tmp_path / "run", "--source", source)
    assert "97" in message and str(source) in message
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_a_token_to_predict_is_refused(tmp_path, capsys):
    folder, source = checkpoint(tmp_path / "cc"), ids_file(tmp_path / "ids.bin", 97, count=10)
    message = refused(capsys, "import", folder, "--run", tmp_path / "run", "--source", source)
    assert message == f"{source} must hold out at least 2 tokens for validation, got 1; give more of it.\n"
    assert not (tmp_path / "run").exists()


def byte_model(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """A model of ours over the 256 bytes, exported as the authors' code would save it."""
    config = GPTConfig(vocab_size=256, context=16, layers=1, heads=2, dim=16, residual=PRESETS["code-tc"])
    model = GPT(config, seed=5)
    keys = {"vocab_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "head_dim": 8}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys | {"block_size": 16}))
    save_file(to_published(model), folder / "model.safetensors")
    return model, keys


def test_evaluating_on_text_with_a_tokenizer(tmp_path, capsys):
    byte_model(tmp_path / "bytes")
    (tmp_path / "text.txt").write_text("one gate for erase and write; " * 60)
    command = ["import", str(tmp_path / "bytes"), "--run", str(tmp_path / "run"), "--source"]
    main([*command, str(tmp_path / "text.txt")])
    main(["evaluate", str(tmp_path / "run"), "--device", "cpu"])
    assert "bits per byte" in capsys.readouterr().out
    assert deepdelta.load(tmp_path / "run").tokenizer is not None
    main(["generate", str(tmp_path / "run"), "--prompt", "one", "--tokens", "3"])
    assert capsys.readouterr().out.startswith("one")
    (tmp_path / "text.txt").write_text("another text than the imported one " * 60)
    assert "another corpus" in refused(capsys, "evaluate", tmp_path / "run", "--device", "cpu")


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path, capsys):
    folder = checkpoint(tmp_path / "cc")
    (tmp_path / "text.txt").write_text("bytes need 256 rows " * 60)
    message = refused(capsys, "import", folder, "--run", tmp_path / "run", "--source", tmp_path / "text.txt")
    assert message == "the corpus has 256 ids, the imported model only 97.\n"
    assert not (tmp_path / "run").exists()


def test_evaluating_without_a_corpus_says_what_to_do(tmp_path, capsys):
    main(["import", str(checkpoint(tmp_path / "cc")), "--run", str(tmp_path / "run")])
    run = tmp_path / "run"
    onward = f"train NEW --config {run / 'config.json'} --init-from {run} --data.source TEXT"
    assert f"Next: deepdelta {onward}\n" in capsys.readouterr().out
    assert "imported without a corpus; import it again with --source" in refused(capsys, "evaluate", run)
    said = refused(capsys, "generate", run, "--prompt", "a")
    assert "so it keeps no tokenizer; import the model again, into another run directory" in said


def test_a_tokenizer_without_its_text_is_refused(tmp_path, capsys):
    given = ("--run", tmp_path / "run", "--tokenizer", "file.json")
    message = refused(capsys, "import", checkpoint(tmp_path / "cc"), *given)
    assert message == "--tokenizer belongs to the text of --source; give that too, or leave it out.\n"
    assert not (tmp_path / "run").exists()


def test_training_from_an_imported_model(tmp_path, unchecked):
    source = ids_file(tmp_path / "ids.bin", 97)
    imported = tmp_path / "imported"
    main(["import", str(checkpoint(tmp_path / "cc")), "--run", str(imported), "--source", str(source)])
    command = ["train", str(tmp_path / "new"), "--init-from", str(imported)]
    command += ["--config", str(imported / "config.json"), "--steps", "2", "--batch-size", "2", "--warmup", "1"]
    main([*command, "--device", "cpu", "--threads", "1", "--eval-every", "2"])
    given = vector("cc-ec")
    model = load_published(given.config, given.parameters)
    corpus = load_corpus(DataConfig(source=str(source), bin_vocab_size=97))
    inputs, labels = batch(corpus.train, seed=0, step=0, batch_size=2, context=64)
    recorded = [row["loss"] for row in rows(tmp_path / "new") if "loss" in row]
    assert recorded[0] == pytest.approx(model(inputs, labels).loss.item(), rel=1e-6)
    assert len(recorded) == 2 and recorded[1] != recorded[0]
    trained = deepdelta.load(tmp_path / "new").model.state_dict()
    assert all(not trained[key].equal(tensor) for key, tensor in model.state_dict().items())


def test_training_from_another_architecture_names_the_tensors(tmp_path, capsys, unchecked):
    source = ids_file(tmp_path / "ids.bin", 97)
    main(["import", str(checkpoint(tmp_path / "cc")), "--run", str(tmp_path / "run")])
    command: list[str | Path] = ["train", tmp_path / "new", "--init-from", tmp_path / "run"]
    command += ["--data.source", source, "--device", "cpu", "--model.context", "16", "--model.layers", "2"]
    command += ["--model.heads", "2", "--model.dim", "32"]
    message = refused(capsys, *command)
    assert "does not fit this model" in message and "unknown tensors" in message and "missing tensors" in message
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_run_is_never_overwritten(tmp_path, capsys):
    folder = checkpoint(tmp_path / "cc")
    main(["import", str(folder), "--run", str(tmp_path / "run")])
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    assert "already holds a run" in refused(capsys, "import", folder, "--run", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_what_a_constant_target_leaves_unused_is_kept_in_the_run(tmp_path):
    """The published `v_proj` of a constant target survives import, loading and export."""
    import_published(checkpoint(tmp_path / "published", "aside-constant"), tmp_path / "run", None)
    given = vector("aside-constant").parameters
    exported = to_published(deepdelta.load(tmp_path / "run").model)
    assert any("v_proj" in name for name in given)
    assert exported.keys() == given.keys()
    assert all(torch.equal(exported[name], given[name]) for name in given)

"""What `deepdelta plan` says, against made models, a real optimiser, published speeds, measured peaks, sums by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepdelta import GPT, PRESETS, GPTConfig, UserError, use_backend
from deepdelta.cli import main
from deepdelta.cli.options import parse
from deepdelta.lab.measure.memory import peak_bytes
from deepdelta.models import parameter_count
from deepdelta.models.flops import training_flops_per_token
from deepdelta.models.gpt import PART_OF_LOGITS
from deepdelta.planning import (
    GPUS,
    Bytes,
    Gpu,
    bytes_per_token,
    fitting,
    held_outside_layers,
    outlook,
    seconds_per_token,
)
from deepdelta.training import TrainConfig
from deepdelta.training.config import run_settings
from deepdelta.training.optimizer import build_optimizer
from deepdelta.training.parallel import check_parallel
from deepdelta.training.ranks import Ranks
from deepdelta.training.recipes import PUBLISHED, RECIPES, recipe

ROOT = Path(__file__).parents[1]
# A fake run is no plain one: what checks types at run time knows no tensors without numbers.
pytestmark = pytest.mark.usefixtures("unchecked")


def tiny(preset: str) -> TrainConfig:
    model = GPTConfig(vocab_size=61, context=32, layers=3, heads=2, dim=32, residual=PRESETS[preset])
    return TrainConfig(model=model, batch_size=4, accumulate=3, steps=50, warmup=5)


def rows(page: str, first: str) -> dict[str, list[str]]:
    """The rows of a page's table whose header starts so, by their first cell."""
    found = re.search(rf"^\| {first} .*\n\|[- |]+\n((?:\|.*\n)+)", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert found is not None
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("preset", ["additive", "code-tc", "ddl"])
def test_parameters_optimiser_and_operations_are_those_of_a_made_model(preset: str) -> None:
    config = tiny(preset)
    found = outlook(config, GPUS["h100"], 2)
    model = GPT(config.model)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    optimizer = build_optimizer(model, config)
    ids = torch.zeros(1, 32, dtype=torch.long)
    model(ids, ids).loss.backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [tensor for one in optimizer.state.values() for tensor in one.values()]
    assert found.optimizer_bytes == sum(tensor.numel() * tensor.element_size() for tensor in state)
    assert found.flops_per_token == 3 * training_flops_per_token(config.model).matrix_forward


@pytest.mark.parametrize("name, gpus, gpu", [("small", 1, "h100"), ("medium", 8, "h100"), ("7b", 8, "h100")])
def test_the_command_that_trains_so(capsys: pytest.CaptureFixture[str], name: str, gpus: int, gpu: str) -> None:
    main(["plan", "--recipe", name, "--preset", "code-cc", "--gpus", str(gpus), "--gpu", gpu])
    line = capsys.readouterr().out.splitlines()[-1]
    start, _, options = line.partition("deepdelta train RUN ")
    assert start == ("" if gpus == 1 else f"torchrun --standalone --nproc-per-node {gpus} -m ")
    config = parse(["train", "RUN", *options.split()]).settings
    planned = run_settings(recipe(name), {"preset": "code-cc"}, where="")
    assert config.tokens_per_step == planned.tokens_per_step
    check_parallel(config, Ranks(0, gpus, object()))
    layout = outlook(planned, GPUS[gpu], gpus).layout
    assert config.batch_size == layout.batch_size * gpus and config.accumulate == layout.accumulate
    assert config.recompute == (layout.name == "FSDP, checkpointed layers")
    assert config.parallel == ("ddp" if layout.name == "DDP" else "fsdp")


@pytest.mark.parametrize("preset", ["additive", "paper-cc"])
def test_memory_is_that_of_a_real_step(preset: str) -> None:
    """In fp32, and from below: at the peak, a real step has not all gradients yet, or not all activations any more."""
    config = replace(tiny(preset).model, layers=6, context=64)
    model, ids = GPT(config), torch.zeros(8, 64, dtype=torch.long)
    use_backend(model, "reference")
    measured = peak_bytes(lambda: model(ids, ids).loss.backward(), [*model.parameters()])
    held = 8 * 64 * bytes_per_token(config, autocast=False).held
    parameters = 4 * parameter_count(config)
    assert 0.95 * (held + parameters) < measured < 1.05 * (held + 2 * parameters)


def test_hours_by_hand() -> None:
    gpu = Gpu(memory=80e9, peak=1e12, bandwidth=1e12)
    # 0.58e9 / (0.58 x 1e12) + 1.64e9 / (1.64 x 1e12) + 0.108e9 / (0.108 x 1e12): 3 ms a token.
    assert seconds_per_token(gpu, 0.58e9, Bytes(0, 1.64e9, 0.108e9)) == pytest.approx(3e-3)
    config = tiny("ddl")
    found, counted = outlook(config, gpu, 4), bytes_per_token(config.model)
    assert found.tokens_per_second == pytest.approx(4 / seconds_per_token(gpu, found.flops_per_token, counted))
    assert found.hours == pytest.approx(50 * 12 * 32 / found.tokens_per_second / 3600)


def test_the_layout_is_the_first_that_fits() -> None:
    model = tiny("additive").model
    numbers, held = 10**9, 1e6  # 18 GB and 32 MB a sequence

    def layout(memory: float, gpus: int = 8) -> tuple[str, int, int]:
        found = fitting(model, Gpu(memory / 0.9, 1, 1), gpus, 12, numbers, held)
        return found.name, found.batch_size, found.accumulate

    assert layout(19e9) == ("DDP", 12, 1)
    assert layout(18.13e9) == ("DDP", 4, 3)
    assert layout(18.03e9) == ("FSDP", 12, 1)
    assert layout(2.04e9) == ("FSDP", 1, 12)
    assert layout(2.03e9)[0] == "FSDP, checkpointed layers"
    with pytest.raises(UserError, match="must fit into 2 GB of a device"):
        layout(1.9e9)
    with pytest.raises(UserError, match="gpus must divide the 12 sequences of a step, got 5"):
        outlook(tiny("ddl"), GPUS["h100"], 5)


def test_many_logits_are_counted_in_parts() -> None:
    """Beyond 2^26 of them: a batch of 8 x 1,024 x 50,304 holds as many of them as 667 tokens have."""
    model = run_settings(recipe("small"), {"preset": "additive"}, where="").model
    held, outside = bytes_per_token(model).held, held_outside_layers(model)
    parameters, gpu = parameter_count(model), GPUS["h200"]
    one, eight = (fitting(model, gpu, 1, size, parameters, held) for size in (1, 8))
    assert (one.batch_size, eight.batch_size) == (1, 8)
    assert one.activations == pytest.approx(1024 * held)
    assert eight.activations == pytest.approx(8192 * (held - outside) + outside * PART_OF_LOGITS / 50304, rel=1e-6)
    assert outside > 6 * 50304 and eight.activations < 0.65 * 8192 * held


def test_published_numbers_are_those_of_the_page() -> None:
    names = {
        "additive baseline": "additive",
        "DDL V=1": "code-scalar",
        "DDL-TC without EC": "code-tc-repeat",
        "DDL-CC without EC": "code-cc-repeat",
        "DDL-TC": "code-tc",
        'DDL-CC (the authors\' "DDL")': "code-cc",
    }
    page = rows("docs/numbers.md", "model")
    assert len(PUBLISHED) == 2 * len(names) == 2 * len(page)
    for name, preset in names.items():
        for column, size in enumerate(("small", "medium")):
            loss, score, speed = (page[name][column + 2 * kind] for kind in range(3))
            known = PUBLISHED[size, preset]
            assert (known.loss, known.score) == (float(loss), float(score))
            assert known.tokens_per_second == (None if speed == "-" else pytest.approx(1e3 * float(speed)))


def test_the_page_says_how_wrong_it_is() -> None:
    page = rows("docs/planning.md", "preset")
    for size, preset in [("small", "additive"), ("small", "code-tc"), ("medium", "code-cc")]:
        at = 0 if size == "small" else 3
        planned = outlook(run_settings(recipe(size), {"preset": preset}, where=""), GPUS["h200"], 4).tokens_per_second
        known = PUBLISHED[size, preset].tokens_per_second
        assert known is not None
        assert page[preset][at : at + 3] == [
            f"{known / 1e3:.1f}", f"{planned / 1e3:.1f}", f"{100 * (planned / known - 1):+.1f} %",
        ]  # fmt: skip
    errors = [float(cell[:-2]) for cells in page.values() for cell in (cells[2], cells[5]) if cell != "-"]
    assert len(errors) == 11 and (round(min(errors)), round(max(errors))) == (-10, 18)


def test_the_page_says_how_memory_compares_with_what_we_measured() -> None:
    page = rows("docs/planning.md", "preset, plain PyTorch")
    group = json.loads((ROOT / "results/bench-bar/results.json").read_text(encoding="utf-8"))["groups"]
    (cases,) = [one["rows"] for one in group if one["group"]["name"] == "memory, 24 layers"]
    for preset in ("additive", "paper-cc"):
        config = GPTConfig(vocab_size=512, context=256, layers=24, heads=4, dim=256, residual=PRESETS[preset])
        planned = 16 * parameter_count(config) + 8 * 256 * bytes_per_token(config, autocast=False).held
        (measured,) = [case["peak_bytes"] for case in cases if case["case"] == preset]
        assert page[preset] == [
            f"{measured / 2**20:,.0f}", f"{planned / 2**20:,.0f}", f"{100 * (planned / measured - 1):+.1f} %",
        ]  # fmt: skip


def test_recipes_are_those_of_the_page_and_runs() -> None:
    page = rows("docs/planning.md", "recipe")
    assert list(page) == [*RECIPES]
    for name, (layers, heads, dim, parameters, _) in page.items():
        config = run_settings(recipe(name), {"preset": "additive"}, where="")
        model = config.model
        assert (model.layers, model.heads, model.dim) == (int(layers), int(heads), int(dim)) and model.head_width == 128
        assert f"{parameter_count(model):,}" == parameters
        assert (config.tokens_per_step, config.lr, config.warmup) == (480 * 1024, 1e-3, 2000)


def test_a_run_takes_a_recipe_and_what_is_given_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("warmup = 9")
    words = f"train r --recipe small --preset code-tc --config {tmp_path / 'a.toml'} --steps 70"
    settings = parse(words.split()).settings
    assert settings == run_settings(recipe("small"), {"preset": "code-tc", "warmup": 9, "steps": 70}, where="")
    with pytest.raises(UserError, match="did you mean 'small'"):
        parse("train r --recipe smal".split())


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--recipe", "medium", "--preset", "code-cc", "--gpus", "8", "--gpu", "h100"])
    shown = capsys.readouterr().out
    for part in ("353,873,236", "DDP", "422,300 on 4 h200", "fitted", "within -10 % and +18 %", "2.5758"):
        assert part in shown
    for words, told in {
        "--recipe mediun": "did you mean 'medium'?",
        "--gpu h101": "did you mean 'h100'?",
        "--preset ddk": "did you mean 'ddl'?",
        "--gpus 7": "gpus must divide the 480 sequences of a step, got 7",
        "--recipe 7b": "give more gpus",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words.split()])
        assert ended.value.code == 2 and told in " ".join(capsys.readouterr().err.split())

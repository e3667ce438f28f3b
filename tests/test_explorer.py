"""The pages of `deepdelta explore` without a browser: their data, their algebra, what they let in; see test_browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepdelta
from deepdelta import GPT, DeltaResidual, GPTConfig, ResidualConfig, UserError, explore, recording
from deepdelta.cli import main
from deepdelta.data.tokenizer import ByteTokenizer
from deepdelta.explorer import operator_page
from deepdelta.explorer.trace import trace
from helpers import perturb
from tiny_runs import config, quietly, text_file

pytestmark = pytest.mark.usefixtures("unchecked")
SOURCE = Path(deepdelta.__file__).parent / "explorer"
PROMPT = "def f(x): </script><script>alert(1)</script>\u2028&é"


def data_of(page: str) -> Any:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def gpt(rule: str = "delta", **options: Any) -> GPT:
    model = GPT(
        GPTConfig(vocab_size=256, context=64, layers=2, heads=2, dim=16, residual=ResidualConfig(rule=rule, **options))
    )
    perturb(model, size=0.1)
    return model.eval()


def vector(dim: int, layer: dict[str, float]) -> Tensor:
    a, h = torch.deg2rad(torch.tensor([layer["angle"], layer["height"] * (dim == 3)], dtype=torch.float64))
    return layer["length"] * torch.stack([h.cos() * a.cos(), h.cos() * a.sin(), h.sin()])[:dim]


def matrix(dim: int, layers: list[dict[str, float]]) -> Tensor:
    product = torch.eye(dim, dtype=torch.float64)
    for layer in layers:
        k = vector(dim, layer)
        product = (torch.eye(dim, dtype=torch.float64) - layer["beta"] * torch.outer(k, k)) @ product
    return product


def in_order(values: Tensor) -> list[complex]:
    return sorted(map(complex, values.tolist()), key=lambda z: (round(z.real, 6), z.imag))


def test_the_operator_page_stands_alone_and_is_always_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        main(["explore", "--out", str(tmp_path / f"{name}.html")])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "b.html").read_text(encoding="utf-8") == operator_page()
    assert len(page.encode()) < 100_000
    assert set(re.findall(r"https?://[^\"'\s]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page and not re.search(r"<link|<img|@import|\bfetch\(|src=", page)


@pytest.mark.parametrize("preset", data_of(operator_page())["presets"], ids=lambda preset: preset["id"])
def test_facts_carry_the_numbers_of_their_matrices(preset: dict[str, Any]) -> None:
    M = matrix(preset["dim"], preset["layers"])
    eigenvalues = torch.view_as_complex(torch.tensor(preset["eigenvalues"], dtype=torch.float64))
    assert in_order(eigenvalues) == pytest.approx(in_order(torch.linalg.eigvals(M)), abs=1e-7)
    assert preset["singular_values"] == pytest.approx(torch.linalg.svdvals(M).tolist(), abs=1e-12)
    assert preset["determinant"] == pytest.approx(torch.linalg.det(M).item(), abs=1e-12)
    lifted = torch.kron(torch.eye(preset["channels"], dtype=torch.float64), M)
    assert preset["lifted"] == pytest.approx(torch.linalg.det(lifted).item(), abs=1e-12)


def test_the_algebra_of_the_page_is_that_of_matrices() -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("node is absent: the browser tests check the same")
    generator = torch.Generator().manual_seed(0)
    cases = []
    for i in range(300):
        dim, count = 2 + i % 2, 1 + i % 5
        numbers = torch.rand(count, 4, generator=generator, dtype=torch.float64)
        special = torch.randint(0, 3, (count,), generator=generator)
        layers = [
            {
                "beta": float(j) if i % 4 == 0 else 2 * b,
                "angle": 360 * a - 180,
                "height": 180 * h - 90,
                "length": 1.0 if i % 3 else 1.5 * r,
                "v": 0.3,
            }
            for (b, a, h, r), j in zip(numbers.tolist(), special.tolist(), strict=True)
        ]
        cases.append({"dim": dim, "layers": layers})
    code = f"""
const algebra = require({json.dumps(str(SOURCE / "algebra.js"))});
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(({{ dim, layers }}) => {{
  const solved = layers.map((layer) => ({{ ...layer, k: algebra.vector(dim, layer) }}));
  const M = algebra.product(solved);
  const x = [0.3, -1.1, 0.7].slice(0, dim);
  return {{ eigenvalues: algebra.eigenvalues(M), singular: algebra.singularValues(M), determinant: algebra.determinant(solved),
    lifted: algebra.determinant(solved, 3), names: solved.map(algebra.regime), x: solved.reduce((y, l) => algebra.rewrite(l, y), x) }};
}})));"""  # noqa: E501
    done = subprocess.run([node, "-e", code], input=json.dumps(cases), capture_output=True, text=True, check=True)
    for case, found in zip(cases, json.loads(done.stdout), strict=True):
        M = matrix(case["dim"], case["layers"])
        eigenvalues = torch.view_as_complex(torch.tensor(found["eigenvalues"], dtype=torch.float64))
        assert in_order(eigenvalues) == pytest.approx(in_order(torch.linalg.eigvals(M)), abs=1e-6)
        assert found["singular"] == pytest.approx(torch.linalg.svdvals(M).tolist(), abs=1e-10)
        assert found["determinant"] == pytest.approx(torch.linalg.det(M).item(), abs=1e-10)
        assert found["lifted"] == pytest.approx(torch.linalg.det(M).item() ** 3, abs=1e-10)
        x = torch.tensor([0.3, -1.1, 0.7][: case["dim"]], dtype=torch.float64)
        for layer, name in zip(case["layers"], found["names"], strict=True):
            k, beta = vector(case["dim"], layer), torch.tensor(layer["beta"], dtype=torch.float64)
            assert name == deepdelta.DeltaOperator(k, beta).regime().item()
            x = x + beta * k * (layer["v"] - k @ x)
        assert found["x"] == pytest.approx(x.tolist(), abs=1e-12)


def test_what_is_traced_is_what_the_recorder_tells() -> None:
    model, records = gpt(gate_per_channel=True), []
    ids = torch.tensor([ByteTokenizer().encode("state")])
    with recording(model, lambda name, record: records.append((name, record))):
        model(ids)
    found = trace(model, ByteTokenizer(), "state")
    assert found["ids"] == ids[0].tolist() and found["texts"]["115"] == "s"
    assert [rewrite["name"] for rewrite in found["rewrites"]] == [name for name, _ in records]
    for rewrite, (_, record) in zip(found["rewrites"], records, strict=True):
        for name, expected in {
            **{
                name: getattr(record, name)
                for name in ("beta", "erase", "read", "target", "cosine", "state_norm", "norm")
            },
            "erased": record.erase * record.read,
            "written": record.write,
        }.items():
            assert torch.equal(torch.tensor(rewrite[name]), expected[0]), name


@pytest.mark.parametrize("rule", ["delta", "write_only", "additive", "two_gate"])
def test_the_lens_looks_out_of_every_state(rule: str) -> None:
    model, states, ids = gpt(rule), [], torch.tensor([ByteTokenizer().encode("gate erase")])
    parts = [part for part in model.modules() if isinstance(part, DeltaResidual)]
    hooks = [part.register_forward_hook(lambda module, args, state: states.append(state)) for part in parts]
    with torch.no_grad():
        logits = model(ids).logits
        expected = [F.linear(model.norm(model.stream.reduce(state)), model.embedding.weight) for state in states]
    torch.testing.assert_close(expected[-1], logits)
    for hook in hooks:
        hook.remove()
    lens = trace(model, ByteTokenizer(), "gate erase")["lens"]
    assert len(lens) == len(states) + 1
    for seen, said in zip(lens[1:], expected, strict=True):
        chances = said[0].double().softmax(-1)
        for token, (entry, chance) in enumerate(zip(seen, chances, strict=True)):
            assert [p for _, p in entry["top"]] == pytest.approx(chance.topk(8).values.tolist(), rel=1e-4)
            if token + 1 < ids.shape[1]:
                p, place = entry["next"]
                assert p == pytest.approx(chance[ids[0, token + 1]].item(), rel=1e-4)
                assert abs(place - 1 - (chance > p).sum().item()) <= 1
    assert seen[-1]["next"] is None


def test_a_retrofitted_model_of_another_library_is_followed(tmp_path: Path) -> None:
    from retrofit_models import gpt2

    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) % 50 for letter in text]

        def decode(self, ids: list[int]) -> str:
            return chr(ids[0] + 50)

    model = deepdelta.retrofit(gpt2(), value_channels=2)
    perturb(model, size=0.05)
    explore(model, Letters(), "depth", tmp_path / "page.html")
    run = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["runs"][0]
    assert len(run["rewrites"]) == 6 and run["what"] == type(model).__name__
    with torch.no_grad():
        chances = model.eval()(torch.tensor([Letters().encode("depth")])).logits[0].softmax(-1)
    assert [entry["top"][0][1] for entry in run["lens"][-1]] == pytest.approx(chances.max(-1).values.tolist(), rel=1e-4)


def test_a_page_holds_text_as_text_and_its_numbers_lie_beside_it(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>\x1b"
    models = {name: gpt(), "twin": gpt("write_only")}
    models[name].train()
    out = explore(models, ByteTokenizer(), PROMPT, tmp_path / "page.html")
    assert models[name].training and all(part.training for part in models[name].modules())
    page = out.read_text(encoding="utf-8")
    assert "alert(1)" in page and "<script>alert" not in page and "\x1b" not in page and "\u2028" not in page
    beside = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    assert beside["prompt"] == PROMPT and [run["name"] for run in beside["runs"]] == [name, "twin"]
    assert [run["rewrites"] for run in data_of(page)["runs"]] == [run["rewrites"] for run in beside["runs"]]
    assert beside["runs"][1]["rewrites"][0]["erased"] is None
    again = explore(models, ByteTokenizer(), PROMPT, tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == page


def test_runs_are_explored_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = text_file(tmp_path / "text.txt")
    for name, rule in (("one", "delta"), ("two", "write_only")):
        quietly(config(source, steps=1, backend="reference", model={"residual": {"rule": rule}}), tmp_path / name)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    main(["explore", one, "--prompt", "state", "--with", two])
    assert capsys.readouterr().out.endswith(f"Next: read {one}/explore.html\n")
    beside = json.loads((tmp_path / "one" / "explore.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in beside["runs"]] == [one, two]
    assert "rule write_only, V = 4, 1 layer, width 16" in beside["runs"][1]["what"]
    for words, message in [
        ([one], "give --prompt TEXT"),
        (["--prompt", "a"], "--prompt and --with belong to a run"),
        ([one, "--prompt", "a" * 17], "the model's context is 16 tokens, got 17"),
        ([one, "--prompt", ""], "the prompt must hold at least one token, got none"),
        ([str(tmp_path), "--prompt", "a"], "is not a run directory"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["explore", *words])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and message in said, said


class Changing(nn.Module):
    """Changes its state between rewrites."""

    def __init__(self, inside: GPT, factor: float) -> None:
        super().__init__()
        self.inside = inside
        inside.layers[0].register_forward_hook(lambda module, args, state: factor * state)

    def forward(self, ids: Tensor) -> Any:
        return self.inside(ids)


def test_what_cannot_be_followed_is_said() -> None:
    with pytest.raises(UserError, match="one DeltaStream is needed to follow its state, got 0"):
        trace(nn.Linear(2, 2), ByteTokenizer(), "a")
    with pytest.raises(UserError, match="changes its state between rewrites"):
        trace(Changing(gpt(), 2.0), ByteTokenizer(), "abc")
    assert len(trace(Changing(gpt(), 1.0), ByteTokenizer(), "abc")["rewrites"]) == 4

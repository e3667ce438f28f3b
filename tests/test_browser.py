"""The explorer's pages as people meet them, in Debian's Chromium: make test-browser."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deepdelta
from browsing import LAYOUT, NASTY, SIZES, focused, opened, serious
from deepdelta import GPT, DeltaOperator, GPTConfig
from deepdelta.cli import main
from deepdelta.data.tokenizer import ByteTokenizer
from helpers import perturb

pytestmark = pytest.mark.browser
REGIMES = {0.0: "Identity", 0.4: "Under-relaxed", 1.0: "Projection", 1.6: "Over-relaxed", 2.0: "Reflection"}


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both pages; the models have names and a prompt that want to be markup."""
    folder = tmp_path_factory.mktemp("pages")
    main(["explore", "--out", str(folder / "operator.html")])
    residuals = {NASTY: "delta", "its twin": "write_only"}
    models = {}
    for name, rule in residuals.items():
        residual = deepdelta.ResidualConfig(rule=rule)
        models[name] = GPT(GPTConfig(vocab_size=256, context=64, layers=3, heads=2, dim=16, residual=residual))
        perturb(models[name])
    deepdelta.explore(models, ByteTokenizer(), f"def f(x):\n\treturn {NASTY}é", folder / "token.html")
    return {name: folder / f"{name}.html" for name in ("operator", "token")}


def number(text: str) -> complex:
    return complex(text.replace("−", "-").replace(" ", "").replace("i", "j"))


def said(page: Any, row: str) -> list[complex]:
    """The numbers of a row as they stand on the page."""
    return [number(text) for text in page.locator(f"#{row} .number").all_inner_texts()]


def settings(page: Any) -> dict[str, float]:
    names = ("beta", "angle", "height", "length", "v", "channels", "steps")
    return {name: float(page.locator(f"#{name}-number").input_value()) for name in names}


def operators(page: Any, dim: int, layers: int) -> list[tuple[DeltaOperator, dict[str, float]]]:
    """The layers as they are set, each read off its controls."""
    found = []
    for i in range(layers):
        page.click(f"#layer-{i + 1}")
        now = settings(page)
        a, h = torch.deg2rad(torch.tensor([now["angle"], now["height"] if dim == 3 else 0], dtype=torch.float64))
        unit = torch.stack([h.cos() * a.cos(), h.cos() * a.sin(), h.sin()])[:dim]
        found.append((DeltaOperator(now["length"] * unit, torch.tensor(now["beta"], dtype=torch.float64)), now))
    return found


def near(shown: list[complex], exact: torch.Tensor) -> bool:
    ours = sorted(shown, key=lambda z: (round(z.real, 5), z.imag))
    theirs = sorted(map(complex, exact.reshape(-1).tolist()), key=lambda z: (round(z.real, 5), z.imag))
    return len(ours) == len(theirs) and all(
        abs(a - b) <= 1e-6 * max(1, abs(b)) for a, b in zip(ours, theirs, strict=True)
    )


def check_numbers(page: Any, dim: int, layers: int) -> None:
    found = operators(page, dim, layers)
    last, now = found[-1]
    product = DeltaOperator.compose([operator for operator, _ in found])
    channels = int(now["channels"])
    for prefix, operator in [("", last), *([("all-", product)] if layers > 1 else [])]:
        assert near(said(page, f"{prefix}eigenvalues"), operator.eigenvalues())
        assert near(said(page, f"{prefix}singular"), operator.singular_values())
        assert near(said(page, f"{prefix}determinant"), operator.determinant())
        assert near(said(page, f"{prefix}lifted"), operator.determinant(channels))
    assert page.inner_text("#regime").lower() == last.regime().item()
    (before,), (after,), (law,) = said(page, "error-before"), said(page, "error-after"), said(page, "error-law")
    assert abs(after - law) <= 1e-6 and abs(after - last.determinant().item() * before) <= 2e-6 * max(1, abs(after))
    strength, steps = 1 - last.determinant().item(), int(now["steps"])
    assert near([number(page.inner_text("#factor-one"))], last.determinant())
    assert near([number(page.inner_text("#factor-flow"))], torch.tensor(-strength, dtype=torch.float64).exp())
    if steps > 1:
        assert near([number(page.inner_text("#factor-many"))], torch.tensor((1 - strength / steps) ** steps))


@pytest.mark.parametrize("dim", [2, 3])
def test_numbers_are_the_operators_wherever_the_sliders_stand(chromium: Any, pages: dict[str, Path], dim: int) -> None:
    draw = random.Random(dim)
    with opened(chromium, pages["operator"]) as page:
        page.click("#two" if dim == 2 else "#three")
        for layers in (1, 2, 3, 4):
            if layers > 1:
                page.click("#add")
            for _ in range(3):
                page.click(f"#layer-{draw.randint(1, layers)}")
                page.fill("#beta-number", str(draw.choice([0, 1, 2, round(draw.uniform(0, 2), 2)])))
                page.fill("#angle-number", str(draw.randint(-180, 180)))
                page.fill("#length-number", str(draw.choice([1, 1, round(draw.uniform(0, 1.5), 2)])))
                page.fill("#v-number", str(round(draw.uniform(-1.5, 1.5), 2)))
                page.fill("#channels-number", str(draw.randint(1, 8)))
                page.fill("#steps-number", str(draw.randint(1, 64)))
                if dim == 3:
                    page.fill("#height-number", str(draw.randint(-90, 90)))
                check_numbers(page, dim, layers)


@pytest.mark.parametrize("dim", [2, 3])
def test_sliders_and_handles_obey_keys_and_the_pointer(chromium: Any, pages: dict[str, Path], dim: int) -> None:
    with opened(chromium, pages["operator"]) as page:
        page.click("#two" if dim == 2 else "#three")
        page.fill("#v-number", "0.2")
        for target, key, name in [
            ("#beta", "ArrowLeft", "beta"),
            ("#angle", "ArrowRight", "angle"),
            ("#handle-beta", "ArrowUp", "beta"),
            ("#handle-k", "ArrowLeft", "angle"),
            ("#handle-v", "ArrowRight", "v"),
            *([("#handle-k", "ArrowUp", "height"), ("#tilt", "ArrowUp", "tilt")] if dim == 3 else []),
        ]:
            before = page.input_value(f"#{name}-number")
            page.focus(target)
            page.keyboard.press(key)
            assert page.input_value(f"#{name}-number") != before, (target, key)
            check_numbers(page, dim, 1)
        for handle, name in (("k", "angle"), ("v", "v"), ("beta", "beta")):
            before, box = page.input_value(f"#{name}-number"), page.locator(f"#handle-{handle} .halo").bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 25, y - 20, steps=3)
            page.mouse.up()
            assert page.input_value(f"#{name}-number") != before, handle
            check_numbers(page, dim, 1)
        if dim == 3:
            before, box = page.input_value("#turn-number"), page.locator("#picture").bounding_box()
            page.mouse.move(box["x"] + 10, box["y"] + 10)
            page.mouse.down()
            page.mouse.move(box["x"] + 60, box["y"] + 30)
            page.mouse.up()
            assert page.input_value("#turn-number") != before


def test_beta_is_named_and_told_as_it_moves(chromium: Any, pages: dict[str, Path]) -> None:
    with opened(chromium, pages["operator"]) as page:
        sentences = set()
        for beta, name in REGIMES.items():
            page.fill("#beta-number", str(beta))
            assert page.inner_text("#regime") == name
            sentences.add(page.inner_text("#sentence"))
        assert len(sentences) == len(REGIMES)
        page.click("#play")
        while float(page.input_value("#beta")) < 0.2:
            page.wait_for_timeout(20)
        page.click("#play")
        assert 0 < float(page.input_value("#beta")) < 2


def test_the_page_agrees_with_the_numbers_that_it_carries(chromium: Any, pages: dict[str, Path]) -> None:
    with opened(chromium, pages["operator"]) as page:
        assert page.evaluate("difference()") < 1e-12
        for preset in page.evaluate("PRESETS"):
            page.click(f"#preset-{preset['id']}")
            assert page.inner_text("#fact") == preset["fact"]
            check_numbers(page, preset["dim"], len(preset["layers"]))


def views(page: Any, name: str) -> Iterator[str]:
    """The states of a page that are looked at."""
    if name == "operator":
        for preset in page.evaluate("PRESETS.map((preset) => preset.id)"):
            page.click(f"#preset-{preset}")
            yield preset
        extreme = "{ beta: 2, angle: -179, height: -89, length: 1.5, v: -1.49 }"
        for dim in (2, 3):
            page.evaluate(
                f"state.layers = Array.from({{ length: 6 }}, (_, i) => ({{ ...{extreme}, angle: 25 * i - 179 }}))"
            )
            page.evaluate(f"Object.assign(state, {{ dim: {dim}, channels: 8, steps: 64, selected: 5 }}); update()")
            yield f"extreme in {dim} dimensions"
    else:
        for step in (1, 3, 6):
            page.evaluate(f"go({step}, {step * 4})")
            yield str(step)


@pytest.mark.parametrize("name", ["operator", "token"])
@pytest.mark.parametrize(("width", "theme"), SIZES)
def test_nothing_overlaps_or_is_cut_and_axe_finds_nothing_serious(
    chromium: Any, pages: dict[str, Path], name: str, width: int, theme: str
) -> None:
    with opened(chromium, pages[name], width, theme) as page:
        for view in views(page, name):
            assert page.evaluate(LAYOUT) == [], view
        assert serious(page) == []


def test_the_operator_needs_no_pointer(chromium: Any, pages: dict[str, Path]) -> None:
    with opened(chromium, pages["operator"]) as page:
        page.click("#three")
        page.click("#add")
        page.reload()
        reached = list(focused(page))
        for wanted in (
            "theme",
            "preset-turn",
            "two",
            "three",
            "handle-k",
            "handle-beta",
            "handle-v",
            "beta",
            "play",
            "v",
        ):
            assert wanted in reached
        page.focus("#preset-turn")
        page.keyboard.press("Enter")
        assert number(page.locator("#all-eigenvalues .number").first.inner_text()).imag != 0
        page.focus("#three")
        page.keyboard.press("Space")
        assert page.get_attribute("#three", "aria-pressed") == "true"
        page.focus("#theme")
        page.keyboard.press("Enter")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_token_is_followed_by_the_arrow_keys_with_the_numbers_of_the_file(
    chromium: Any, pages: dict[str, Path]
) -> None:
    data = json.loads(pages["token"].with_suffix(".json").read_text(encoding="utf-8"))
    with opened(chromium, pages["token"]) as page:
        assert page.locator("h2", has_text=NASTY).count() == 1 and page.locator("script").count() == 4
        token, step = len(data["runs"][0]["ids"]) - 2, 1
        for key, dt, ds in [
            ("ArrowRight", 0, 1),
            ("ArrowRight", 0, 1),
            ("Shift+ArrowLeft", -1, 0),
            ("ArrowLeft", 0, -1),
        ]:
            page.keyboard.press(key)
            token, step = token + dt, step + ds
            assert page.inner_text("#where").startswith(f"Token {token + 1} of")
            for r, run in enumerate(data["runs"]):
                rewrite = run["rewrites"][step - 1]
                assert f"{rewrite['beta'][token][0]:.3f}" in page.inner_text(f"#says-{r}")
                names = [n for n in ("read", "target", "erased", "written") if rewrite[n] is not None]
                rows = page.locator(f"#run-{r} .records tbody tr").all()
                assert len(rows) == len(names) + 4
                table = [[number(text).real for text in row.locator("td").all_inner_texts()] for row in rows]
                for name, shown in zip(names, table, strict=False):
                    assert shown == pytest.approx(rewrite[name][token], abs=5.1e-5)
                assert table[-2] == pytest.approx(rewrite["state_norm"][token], abs=5.1e-5)
                assert table[-1] == pytest.approx(rewrite["state_norm_after"][token], abs=5.1e-5)
                # what the rewrite left along k, from the error law's own words
                erased = rewrite["erased"][token] if rewrite["erased"] else [0.0] * len(table[0])
                sums = zip(rewrite["read"][token], rewrite["written"][token], erased, strict=True)
                left = [x + rewrite["norm"][token] ** 2 * (w - e) for x, w, e in sums]
                assert table[-4] == pytest.approx(left, abs=5.1e-5)
                chances = page.locator(f"#run-{r} .lens div:nth-child(2) li span:last-child").all_inner_texts()
                top = run["lens"][step][token]["top"]
                assert [float(re.sub("[^0-9.]", "", text)) for text in chances] == pytest.approx(
                    [100 * p for _, p in top], abs=0.51
                )
        page.locator("#tokens button").first.focus()
        page.keyboard.press("Enter")
        assert page.inner_text("#where").startswith("Token 1 of") and page.locator("[aria-current]").count() == 1

"""The pictures of docs/images, remade from real output: make figures.

Two small runs, a delta network and its write-only twin, are trained if they are not there; the same settings give the
same runs. The report is that of results/headline. Needs Debian's Chromium and Playwright.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from animation import picture
from playwright.sync_api import sync_playwright

from deepdelta.lab.analysis.results import load_results
from deepdelta.lab.views import write_report

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
SIZES = "--steps 500 --threads 1 --batch-size 8 --model.layers 3 --model.dim 64 --model.context 128".split()
PROMPT = "    def __init__(self, name, value):\n        self.name = name\n        self.val"
SHOTS = [
    # (image, page, theme, width, height, what is pressed before)
    ("operator-light", "operator", "light", 1320, 1010, ["#preset-over-relaxed"]),
    ("operator-dark", "operator", "dark", 1320, 1010, ["#preset-sphere"]),
    ("operator-two-reflections", "operator", "light", 1320, 1010, ["#preset-turn"]),
    ("operator-phone", "operator", "dark", 390, 1000, ["#preset-overwrite"]),
    ("token-light", "token", "light", 1320, 1340, ["#on"] * 5),
    ("token-dark", "token", "dark", 1320, 1340, ["#on"] * 3),
    ("report-light", "report", "light", 1320, 1476, []),
    ("report-phone", "report", "dark", 390, 1330, []),
]


def deepdelta(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "deepdelta", *words], cwd=ROOT, check=True)


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is needed to see the pages: sudo apt-get install -y chromium")
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "operator.svg").write_text(picture(), encoding="utf-8")
    for rule in ("delta", "write_only"):
        deepdelta("train", f"runs/figures/{rule}", "--preset", "paper-cc", "--model.residual.rule", rule, *SIZES)
    deepdelta("explore", "--out", "build/operator.html")
    twin = ("--with", "runs/figures/write_only", "--out", "build/token.html")
    deepdelta("explore", "runs/figures/delta", "--prompt", PROMPT, *twin)
    write_report(load_results(ROOT / "results/headline/results.json"), ROOT / "build/report.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for image, name, theme, width, height, pressed in SHOTS:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            page.goto((ROOT / "build" / f"{name}.html").as_uri())
            for one in pressed:
                page.click(one)
            page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            page.wait_for_function("!document.querySelector('.plot:empty')")
            page.mouse.move(0, 0)
            page.screenshot(path=str(IMAGES / f"{image}.png"))
            page.close()
        browser.close()


if __name__ == "__main__":
    main()

"""Every example of the README runs; the two make commands run in `make fresh-clone`."""

import os
import re
import subprocess
import sys
from pathlib import Path

from torch import nn

from deepdelta import DeltaStream
from deepdelta.lab.analysis.results import load_results
from deepdelta.lab.views import summarise

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str, page: Path = README) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no {language} block"
    return found


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)


def test_python_blocks(tmp_path: Path) -> None:
    done = run([sys.executable, "-W", "error", "-c", "\n".join(blocks("python"))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"mean gate [01]\.\d+\n", done.stdout)


def test_shell_blocks(tmp_path: Path) -> None:
    """As written but for numbers of steps and tokens: its minutes would be most of what the suite takes."""
    short = "\n".join(blocks("bash"))
    for written, shorter in {
        r"--steps \d+": "--steps 8 --warmup 3 --eval-tokens 512",
        r"--final-eval-tokens \d+": "--final-eval-tokens 512",
        r"(evaluate \S+) --tokens \d+": r"\1 --tokens 512",
    }.items():
        short, times = re.subn(written, shorter, short)
        assert times == 1
    done = run(["bash", "-euo", "pipefail", "-c", short], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first" / "checkpoint.safetensors").exists()
    assert "\ndef " in done.stdout
    assert re.search(r"^bits per byte +\d\.\d{4}, for as many", done.stdout, re.MULTILINE)


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\S+)$", README.read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_it_says_of_the_quick_study_what_the_committed_results_say() -> None:
    results = load_results(README.parent / "results" / "quick" / "results.json")
    # The sentence that the terminal and the report have too: made once, said everywhere.
    assert summarise(results).headline in " ".join(README.read_text(encoding="utf-8").split())


def test_the_page_on_training_has_the_same_commands() -> None:
    assert blocks("bash", README.parent / "docs" / "training.md") == blocks("bash")


def test_what_the_example_costs() -> None:
    stream = DeltaStream(dim=64, value_channels=4)
    mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    own, all_of_it = (sum(p.numel() for p in module.parameters()) for module in (mlp, stream.wrap(mlp)))
    assert f"{all_of_it - own} parameters on a block of {own:,}" in README.read_text(encoding="utf-8")


def test_it_is_short_and_code_comes_first() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert lines.index("```python") < 15

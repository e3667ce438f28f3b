"""Every example of the README runs as it is written; the two make commands run in `make fresh-clone`."""

import os
import re
import subprocess
import sys
from pathlib import Path

from deepdelta.report import markdown_table, summarise
from deepdelta.studies.results import load_results

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"the README has no {language} block"
    return found


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)


def test_python_blocks(tmp_path: Path) -> None:
    done = run([sys.executable, "-W", "error", "-c", "\n".join(blocks("python"))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"mean gate [01]\.\d+\n", done.stdout)


def test_shell_blocks(tmp_path: Path) -> None:
    done = run(["bash", "-euo", "pipefail", "-c", "\n".join(blocks("bash"))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first" / "checkpoint.safetensors").exists()
    assert "\ndef " in done.stdout
    assert re.search(r"^bits per byte +\d\.\d{4}$", done.stdout, re.MULTILINE)


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\S+)$", README.read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_table_is_that_of_the_committed_results() -> None:
    results = load_results(README.parent / "results" / "quick" / "results.json")
    readme = README.read_text(encoding="utf-8")
    assert markdown_table(results).strip() in readme
    # The sentence that the terminal and the report have too: made once, said everywhere.
    assert summarise(results).headline in " ".join(readme.split())

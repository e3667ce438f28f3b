"""Everything that is measured on a GPU, one step after another: `make gpu`, and `make gpu DRY=1` without one.

Names what is absent, then tests, doctor and benchmark, each of which writes as it goes; a step that fails does not
keep the others from running, but makes the whole end with an error. Dry, the tests are collected and skipped and the
benchmark is the quick one on the CPU.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NEEDED = ["torch", "triton", "pytest", "numpy", "safetensors", "tokenizers", "rich", "jaxtyping", "pydantic"]
NEEDED += ["annotated_types", "tyro"]
PLOTS = "no plots; `deepdelta bench --redraw FOLDER` makes them elsewhere"
OPTIONAL = {
    "hyper_connections": "the rivals hyper-connections and mhc are left out of the benchmark",
    "matplotlib": PLOTS,
    "jinja2": PLOTS,
}


def absent(names: list[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def main(out: Path, dry: bool) -> int:
    if missing := absent(NEEDED):
        print(f"absent, and needed: {', '.join(missing)}. Nothing was run.")
        return 2
    for name in absent(list(OPTIONAL)):
        print(f"absent: {name}; {OPTIONAL[name]}.")
    import torch

    if not dry and not torch.cuda.is_available():
        print("torch sees no CUDA device. `make gpu DRY=1` goes through all of it without one. Nothing was run.")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    bench = ["deepdelta", "bench", "gpu", "--out", str(out / "bench"), *(["--quick"] if dry else ["--rounds", "15"])]
    steps = {
        "tests": ["pytest", "-c", "tests/gpu/pytest.ini", "tests/gpu"],
        "doctor": ["deepdelta", "doctor"],
        "bench": bench,
    }
    failed = [name for name, command in steps.items() if not done(name, command, out)]
    print(f"All of it: {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def done(name: str, command: list[str], out: Path) -> bool:
    """Whether a module of Python went through; what it says is shown, and kept in a file, at once."""
    began = time.monotonic()
    print(f"== {name}: {' '.join(command)}", flush=True)
    # What was brought along may lie on PYTHONPATH.
    places = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    started = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert started.stdout is not None
    with (out / f"{name}.txt").open("w") as file:
        for line in started.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
    code = started.wait()
    print(f"== {name}: exit {code} after {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), "--dry" in sys.argv))

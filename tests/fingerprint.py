"""Losses of 20 steps of every preset at two seeds, reference and fused, eager fp32, as bits.

    python tests/fingerprint.py measure FILE [--like BASE]   the package on the path, all of it or the rows of BASE
    python tests/fingerprint.py compare BASE HERE            exit code 1 where a bit differs

`make fingerprint BASE=COMMIT` does all of it for two checkouts. Presets are matched by their settings, not their
names. Only what has stayed the same over versions is used: settings as plain data, a run directory's metrics.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

SEEDS, STEPS, BACKENDS = (0, 1), 20, ("reference", "fused")
TEXT = "".join(f"def f{i}(x):\n    return x + {i % 7} * f{i - 1}(x)\n" for i in range(400))
RUN: dict[str, Any] = {
    "model": {"context": 32, "layers": 2, "heads": 2, "dim": 32, "embedding_std": 0.02},
    "steps": STEPS,
    "batch_size": 4,
    "lr": 5e-3,
    "warmup": 5,
    "eval_every": STEPS,
    "eval_tokens": 64,
    "final_eval_tokens": 64,
    "checkpoint_every": STEPS,
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
}


def losses(residual: dict[str, Any], seed: int, backend: str, folder: Path) -> list[str]:
    """The training loss of each step, in hexadecimal."""
    from deepdelta.config import from_plain, merged
    from deepdelta.training import TrainConfig, train

    source, run = folder / "text.txt", folder / "run"
    source.write_text(TEXT, encoding="utf-8")
    changes = {
        "model": {"residual": residual},
        "data": {"source": str(source)},
        "seed": seed,
        "backend": backend,
    }
    train(from_plain(TrainConfig, merged(RUN, changes)), run, say=lambda line: None)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [float(row["loss"]).hex() for row in rows if "loss" in row]


def measure(like: Path | None) -> list[dict[str, Any]]:
    """A row per preset, seed and backend: the preset's settings and its losses."""
    from deepdelta.config import to_plain
    from deepdelta.nn.presets import PRESETS

    own = {name: to_plain(preset) for name, preset in PRESETS.items()}
    if like is None:
        asked = [(name, own[name], seed, backend) for name in own for seed in SEEDS for backend in BACKENDS]
    else:
        asked = [(row["preset"], row["residual"], row["seed"], row["backend"]) for row in read(like)]
    rows = []
    for name, residual, seed, backend in asked:
        with tempfile.TemporaryDirectory() as folder:
            found = losses(residual, seed, backend, Path(folder))
        rows.append(
            {"preset": name, "residual": residual, "seed": seed, "backend": backend, "losses": found}
            | {"named": [own_name for own_name, settings in own.items() if settings == residual]}
        )
        print(f"{name}, seed {seed}, {backend}: {found[-1]}", file=sys.stderr)
    return rows


def read(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def compare(base: Path, here: Path) -> int:
    """Print a line for each row that differs, and how many are equal."""
    theirs, ours = read(base), read(here)
    key = ("preset", "seed", "backend")
    found = {tuple(row[name] for name in key): row for row in ours}
    differing = [row for row in theirs if found[tuple(row[name] for name in key)]["losses"] != row["losses"]]
    for row in differing:
        print("differs:", *(row[name] for name in key))
    for name in {row["preset"] for row in ours if not row["named"]}:
        print(f"no preset here has the settings of {name}")
    print(f"{len(theirs) - len(differing)} of {len(theirs)} runs of {STEPS} steps are equal bit for bit")
    return bool(differing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("file", type=Path)
    measuring.add_argument("--like", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("base", type=Path)
    comparing.add_argument("here", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.base, given.here)
    given.file.write_text(json.dumps(measure(given.like), indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

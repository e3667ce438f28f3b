"""What only shows after hours: `python tests/soak.py OUT [--short]`; results in OUT/soak.json.

- runs killed at 200 seeded points, half of them by a clock and so in the midst of writes, and studies killed with and
  without their runs: every bit as if nothing had been;
- 10,000 checkpoints of a tiny run in one process: memory, open files and threads stay what they were;
- a study of 300 tiny runs: a record of each, no process and no file left that does not belong there.

About 60 minutes on two free cores. `--short` is a fiftieth of it, and says so in its results; `--only` makes some parts
anew, and leaves the others of OUT as they are.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from deepdelta.files import HELD, PARTIAL, read_object, write_json
from deepdelta.provenance import now, provenance
from deepdelta.training import trainer
from deepdelta.training.loop import train
from test_killed import STUDY, assert_same_study, finish_study, kill_in_study, killed_at_points, study
from tiny_runs import config, recorded, start, study_from, text_file


def killed_runs(folder: Path, points: int) -> dict[str, Any]:
    found = killed_at_points(folder, seed=19, points=points, by_clock=True)
    phases: dict[str, int] = {}
    for phase, *_ in found:
        phases[phase] = phases.get(phase, 0) + 1
    wrong = [point for point in found if point[-1]]
    assert not wrong, wrong
    return {"points": len(found), "by_phase": phases, "that_differ": len(wrong)}


def killed_studies(folder: Path, times: int) -> dict[str, Any]:
    study(folder)
    finish_study(folder, folder / "whole")
    for number in range(times):
        who = ("study", "run", "both")[number % 3]
        kill_in_study(folder, folder / "out", who, random.Random(number))
        finish_study(folder, folder / "out")
        assert_same_study(folder / "out", folder / "whole")
        shutil.rmtree(folder / "out")
    return {"kills": times, "that_differ": 0, "processes_left": 0}


def held() -> dict[str, int]:
    """What this process holds: resident memory, open files, threads."""
    me = psutil.Process()
    return {"bytes": me.memory_info().rss, "files": me.num_fds(), "threads": me.num_threads()}


def checkpoints(folder: Path, count: int) -> dict[str, Any]:
    """A run with a checkpoint after every step; the first tenth warms up caches and the allocator."""
    settings = config(
        text_file(folder / "text.txt"), steps=count, checkpoint_every=1, eval_every=count, keep_last=2, warmup=1
    )
    seen: list[dict[str, int]] = []
    saved = trainer.Trainer.save

    def save(self: trainer.Trainer, **how: bool) -> None:
        saved(self, **how)
        if self.step % max(1, count // 20) == 0:
            self._settle()  # or the file that is being written would be among those that are open
            seen.append(held())

    trainer.Trainer.save = save  # type: ignore[method-assign]
    train(settings, folder / "run", say=lambda line: None)
    trainer.Trainer.save = saved  # type: ignore[method-assign]
    first, last = seen[2], seen[-1]
    growth = last["bytes"] - first["bytes"]
    # What the list of losses in metrics.jsonl takes when it is read, and no more.
    assert growth < 16 << 20, seen
    assert (last["files"], last["threads"]) == (first["files"], first["threads"]), seen
    left = sorted(path.name for path in (folder / "run").iterdir())
    assert not [name for name in left if name.endswith(PARTIAL)], left
    assert len(list((folder / "run" / "checkpoints").iterdir())) == 2
    return {"checkpoints": count, "bytes_grown": growth, "bytes_at_the_end": last["bytes"], "files_left": left}


def many_runs(folder: Path, seeds: int) -> dict[str, Any]:
    """Two conditions on so many seeds."""
    other = '[conditions.delta]\nsummary = "the delta rule"\nchanges.model.residual.preset = "paper-scalar"\n'
    replacements = (
        ("seeds = [0, 1]", f"seeds = {list(range(seeds))}"),
        ("steps = 120", "steps = 20"),
        ("rewrite_tokens = 70\n", "rewrite_tokens = 70\nkeep_checkpoints = false\n"),
    )
    study_from(STUDY + other, folder, *replacements)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with start("study", folder / "study.toml", "--out", folder / "out", cwd=folder) as process:
        peak, printed = 0, None
        while printed is None:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            with suppress(subprocess.TimeoutExpired):  # read all along: a full pipe would stop the study
                printed = process.communicate(timeout=1)[0]
    assert process.returncode == 0, printed[-2000:]
    records = recorded(folder / "out")
    assert len(records) == 2 * seeds
    left = {process.pid for process in psutil.Process().children(recursive=True)} - before
    assert not left
    assert not [path for path in (folder / "out").rglob("*") if path.name.endswith(PARTIAL) or path.name == HELD]
    weights = list((folder / "out").rglob("*.safetensors"))
    assert not weights, weights
    return {"runs": len(records), "peak_bytes_of_the_study": peak, "processes_left": 0, "weights_left": 0}


PARTS = (checkpoints, many_runs, killed_runs, killed_studies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[work.__name__ for work in PARTS])
    given = parser.parse_args()
    sizes = {"killed_runs": 200, "killed_studies": 30, "checkpoints": 10_000, "many_runs": 150}
    if given.short:
        sizes = {"killed_runs": 4, "killed_studies": 3, "checkpoints": 200, "many_runs": 3}
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = read_object(given.out / "soak.json", "run all parts") if given.only else {}
    parts = [work for work in PARTS if not given.only or work.__name__ in given.only]
    with tempfile.TemporaryDirectory() as place:
        os.environ["DEEPDELTA_CACHE"] = place
        for work in parts:
            name = work.__name__
            folder, began = Path(place) / name, time.monotonic()
            folder.mkdir()
            found = work(folder, sizes[name]) | {"seconds": round(time.monotonic() - began)}
            results[name] = found | {"short": given.short, "date": now(), **provenance(" ".join(sys.argv))}
            print(name, results[name], flush=True)
            write_json(given.out / "soak.json", results)


if __name__ == "__main__":
    main()

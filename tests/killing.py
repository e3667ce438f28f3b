"""Runs killed by SIGKILL at exact points, in processes forked from this one, so that none imports anything anew.

`python killing.py JOB.json`: the job names a run's settings, a folder, a seed and how many points. A point is the
number of a call into the package, counted from the first of `train`; kills in the midst of C code, a write or a rename,
come from a clock instead.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import deepdelta.training  # what the runs import
from deepdelta import train
from deepdelta.config import from_plain
from deepdelta.training import TrainConfig

PACKAGE = str(Path(deepdelta.__file__).parent)
PHASES = {
    "run_steps": "start",
    "_one_step": "steps",
    "_save": "checkpoint",
    "write_snapshot": "checkpoint",
    "_validate": "evaluation",
}
"""Functions, and what goes on in them; `start` is all before `run_steps`."""


class Counter:
    """Counts calls into the package, on every thread; at the call `last` the process dies on the spot."""

    def __init__(self, last: int | None = None) -> None:
        self.number, self.last, self.phases = itertools.count(1), last, dict[str, list[int]]()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        call = next(self.number)
        if self.last is None:
            self.phases.setdefault(phase(frame), []).append(call)
        elif call == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def phase(frame: FrameType | None) -> str:
    """What the innermost function of PHASES on the stack does."""
    while frame is not None:
        if (name := frame.f_code.co_name) in PHASES:
            return "between" if name == "run_steps" else PHASES[name]
        frame = frame.f_back
    return "start"


def forked(work: Callable[[], None]) -> int:
    """Do it in a process of its own; how that ended, as os.waitstatus_to_exitcode has it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder, draw = Path(job["folder"]), random.Random(job["seed"])
    settings = from_plain(TrainConfig, job["settings"])

    def run(name: str, counter: Counter | None = None) -> None:
        if counter is not None:
            threading.setprofile(counter)
            sys.setprofile(counter)
        train(settings, folder / name, say=lambda line: None)
        sys.setprofile(None)

    def whole() -> None:
        counter, began = Counter(), time.monotonic()
        run("whole", counter)
        seconds = time.monotonic() - began
        (folder / "points.json").write_text(json.dumps({"phases": counter.phases, "seconds": seconds}))

    run("first")  # what is imported and read for the first time is so for all of them
    assert forked(whole) == 0
    counted = json.loads((folder / "points.json").read_text())
    phases, made = counted["phases"], []
    for number in range(job["points"]):
        name = f"run{number}"
        if job["by_clock"] and number % 2:
            after = draw.uniform(0, counted["seconds"] / 2)  # without the counter a run takes about half as long
            made.append(["clock", after])

            def killed(name: str = name, after: float = after) -> None:
                timer = threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
                run(name)
        else:
            kind = sorted(phases)[number // (1 + job["by_clock"]) % len(phases)]
            at = draw.choice(phases[kind])
            made.append([kind, at])

            def killed(name: str = name, at: int = at) -> None:
                run(name, Counter(at))

        ended = forked(killed)
        assert ended == -signal.SIGKILL or (made[-1][0] == "clock" and ended == 0), (made[-1], ended)
        assert forked(lambda name=name: run(name)) == 0, made[-1]  # type: ignore[misc]
        made[-1].append(differing(folder / "whole", folder / name))
        if not made[-1][-1]:
            shutil.rmtree(folder / name)
    return {"points": made}


def differing(one: Path, other: Path) -> list[str]:
    """Files that one has and the other has not, or with other bytes; of metrics, without what a clock decides."""
    names = {str(file.relative_to(run)) for run in (one, other) for file in run.rglob("*") if file.is_file()}
    return sorted(name for name in names if contents(one / name) != contents(other / name))


def contents(file: Path) -> object:
    if not file.exists():
        return None
    if file.name == "metrics.jsonl":
        return [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    if file.name == "environment.json":
        return {key: value for key, value in json.loads(file.read_text()).items() if key != "commit"}
    return file.read_bytes()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

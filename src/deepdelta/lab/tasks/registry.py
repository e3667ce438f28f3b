"""The tasks by name. A task's module holds it as TASK and is imported when it is asked for."""

import importlib
from dataclasses import replace

from deepdelta.errors import unknown, without_extra
from deepdelta.lab.tasks.task import Task

SUMMARIES = {
    "words": "word problems of finite groups, one delta layer per symbol",
    "recall": "multi-query associative recall with overwrites, small causal transformers",
    "digits": "images, a small vision transformer and a small ResNet",
    "dynamics": "pendulum, Lotka-Volterra and bouncing ball, a deep residual MLP that predicts the next state",
    "loops": "a byte GPT of two layers, repeated up to 6 times in training and 32 times when it is tested",
    "networks": "an MLP, a CNN and an encoder with PyTorch's own starts on scikit-learn's digits, at three rates each",
    "registers": "symbols written to registers along depth, one tied layer per instruction, each asked for at the end",
    "rounding": "a byte GPT whose states are rounded to 8 and 4 bits between its sublayers once it is trained",
    "landscape": "a small byte GPT at every rate, embedding scale and depth of a grid: how many of them train well",
    "tabular": "regression on scikit-learn's diabetes table, a residual MLP",
}
"""What each task is; here, so that they can be listed without the packages that they need."""


def named_tasks() -> tuple[str, ...]:
    return tuple(SUMMARIES)


def load_task(name: str) -> Task:
    """A named task.

    Raises:
        UserError: there is none of this name, or a package that it needs is absent.
    """
    if name not in SUMMARIES:
        raise unknown("task", name, SUMMARIES)
    try:
        task: Task = importlib.import_module(f"deepdelta.lab.tasks.{name}").TASK
        return replace(task, name=name, summary=SUMMARIES[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("deepdelta"):
            raise
        raise without_extra(f"runs of the task {name}", "lab", error) from None

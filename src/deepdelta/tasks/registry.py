"""The tasks by name. A task's module holds it as TASK and is imported when it is asked for."""

import importlib

from deepdelta.errors import UserError, nearest
from deepdelta.tasks.task import Task

NAMES = ("words", "recall", "digits", "dynamics", "tabular")


def named_tasks() -> tuple[str, ...]:
    return NAMES


def load_task(name: str) -> Task:
    """A named task.

    Raises:
        UserError: there is none of this name, or a package that it needs is absent.
    """
    if name not in NAMES:
        raise UserError(f"there is no task '{name}'; {nearest(name, NAMES)}")
    try:
        task: Task = importlib.import_module(f"deepdelta.tasks.{name}").TASK
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("deepdelta"):
            raise
        raise UserError(
            f"the task {name} needs the package {error.name}, which is absent: "
            "install it with pip install 'deep-delta-learning[study]'"
        ) from None
    return task

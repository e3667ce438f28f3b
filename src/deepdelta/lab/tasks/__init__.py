"""Tasks beyond text: each has its data, its models, its controls and one number."""

from deepdelta.lab.tasks.registry import load_task, named_tasks
from deepdelta.lab.tasks.task import Progress, Task, Variant

__all__ = ["Progress", "Task", "Variant", "load_task", "named_tasks"]

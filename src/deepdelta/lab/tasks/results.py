"""From the records of a task's runs to its results."""

from collections.abc import Mapping, Sequence

from deepdelta.lab.analysis.tasks import ConditionMetrics, TaskResults, means, task_contrasts
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.tasks.task import Task
from deepdelta.provenance import now, provenance


def collect(
    task: Task, seeds: Sequence[int], records: Mapping[tuple[str, int], RunRecord], command: str
) -> TaskResults:
    """The results of a task: its records, by condition and seed, put together and compared."""
    conditions = {}
    for name, variant in task.conditions.items():
        own = {seed: record for (condition, seed), record in sorted(records.items()) if condition == name}
        metrics = {seed: record.metrics for seed, record in own.items() if record.diverged is None}
        conditions[name] = ConditionMetrics(
            name=name,
            summary=variant.summary,
            control=variant.control,
            metrics=metrics,
            diverged=tuple(seed for seed, record in own.items() if record.diverged is not None),
            means=means(metrics),
        )
    return TaskResults(
        task=task.name,
        summary=task.summary,
        primary=task.primary,
        unit=task.unit,
        higher_is_better=task.higher_is_better,
        baseline=task.baseline,
        seeds=tuple(seeds),
        **provenance(command),
        finished=now(),
        conditions=tuple(conditions.values()),
        refuted=task.refuted,
        left_out=task.left_out,
        contrasts=task_contrasts(conditions, task.baseline, task.primary),
    )

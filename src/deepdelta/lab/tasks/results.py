"""From the records of a task's runs to its results."""

from collections import Counter
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
    here = provenance(command)
    counts = Counter((record.commit, record.machine.get("processor", "")) for record in records.values())
    collected = here["commit"], here["machine"].get("processor", "")
    return TaskResults(
        task=task.name,
        summary=task.summary,
        primary=task.primary,
        unit=task.unit,
        higher_is_better=task.higher_is_better,
        baseline=task.baseline,
        seeds=tuple(seeds),
        **here,
        finished=now(),
        conditions=tuple(conditions.values()),
        refuted=task.refuted,
        left_out=task.left_out,
        made=tuple(_made(*one) for one in counts.items()) if {*counts} != {collected} else (),
        contrasts=task_contrasts(conditions, task.baseline, task.primary),
    )


def _made(at: tuple[str | None, str], count: int) -> str:
    commit, processor = at
    return f"{count} at commit {(commit or 'unknown')[:12]} on {processor or 'an unknown processor'}"

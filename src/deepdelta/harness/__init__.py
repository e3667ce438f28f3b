"""A run under the tasks of lm-eval: log-likelihoods and continuations for its tasks, small sets of our own, results."""

from deepdelta.harness.results import TaskResult, evaluate_tasks, read_results, table

__all__ = ["TaskResult", "evaluate_tasks", "read_results", "table"]

"""What a run reaches in tasks of lm-eval: computed, kept in its tasks/results.json, shown as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich import box
from rich.table import Table

from deepdelta.config import from_plain, to_plain
from deepdelta.device import choose_device
from deepdelta.errors import UserError, require
from deepdelta.files import FORMAT, AnyPath, check_format, locked, read_object, write_json
from deepdelta.provenance import now, versions
from deepdelta.training import RunDirectory
from deepdelta.training.checkpoints import CHECKPOINT

FOLDER, FILE_NAME = "tasks", "results.json"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task, as measured at one time."""

    task: str
    task_version: str
    checkpoint: str
    step: int
    shots: int
    """Worked examples before each question."""
    limit: int | None
    """The first so many of the questions; None: all of them."""
    questions: int
    metrics: dict[str, float]
    """By lm-eval's names, with its standard errors (`_stderr`)."""
    versions: dict[str, str]
    measured: str

    @property
    def key(self) -> tuple[object, ...]:
        """What a later result of the same replaces."""
        return self.task, self.checkpoint, self.shots, self.limit


def evaluate_tasks(
    run: AnyPath,
    tasks: Sequence[str],
    *,
    checkpoint: str = CHECKPOINT,
    shots: int = 0,
    limit: int | None = None,
    data: Path | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> list[TaskResult]:
    """Measure a run in tasks by name, and keep the results in its `tasks/results.json`; a new one replaces its like.

    Args:
        tasks: of `harness.tasks.PUBLIC`, `OWN`, or any other of lm-eval's.
        checkpoint: which of the run's, as `load` takes it.
        shots: worked examples before each question.
        limit: take the first so many questions of each task alone, to try things.
        data: where copies of data sets lie, each under its name on the Hugging Face hub.
        batch_size: requests in one forward pass.

    Raises:
        UserError: the extra `eval` is absent; no such task, or none of its data; the run keeps no tokenizer.
    """
    require("Tasks of lm-eval", "eval", "lm_eval", "datasets")
    if not tasks:
        raise UserError("name at least one task, got none.")
    for name, value, low in (("shots", shots, 0), ("limit", 1 if limit is None else limit, 1)):
        if value < low:
            raise UserError(f"{name} must be at least {low}, got {value}.")
    directory = RunDirectory(run)
    tokenizer = directory.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"{run} keeps no tokenizer, and tasks are text; train with --data.tokenizer, or import with it."
        )
    chosen = choose_device(device, "fp32")
    model = directory.model(checkpoint).to(chosen.device)
    # Here: what lm-eval imports takes seconds, and what must hold is known by now.
    from lm_eval.evaluator import evaluate

    from deepdelta.harness.model import HarnessModel
    from deepdelta.harness.tasks import loaded, quiet

    found = loaded(tasks, data)
    for task in found["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(seed=0)
    measured = HarnessModel(model, tokenizer, batch_size=batch_size)
    with quiet():
        told = evaluate(measured, found, limit=limit, bootstrap_iters=1000, log_samples=False)
    results = [
        TaskResult(
            task=name,
            task_version=str(told["versions"].get(name, "")),
            checkpoint=checkpoint,
            step=directory.checkpoint(checkpoint).step,
            shots=shots,
            limit=limit,
            questions=told["n-samples"][name]["effective"],
            metrics={
                key.removesuffix(",none"): float(value)
                for key, value in told["results"][name].items()
                if isinstance(value, int | float) and "," in key
            },
            versions=versions() | {"lm-eval": version("lm-eval"), "datasets": version("datasets")},
            measured=now(),
        )
        for name in found["tasks"]
    ]
    _keep(directory.path, results)
    return results


def read_results(run: AnyPath) -> list[TaskResult]:
    """What a run was measured to reach so far."""
    file = Path(run) / FOLDER / FILE_NAME
    if not file.exists():
        return []
    plain = read_object(file, "mend it, or delete it and evaluate anew")
    check_format(plain, file)
    return [from_plain(TaskResult, one, where=str(file)) for one in plain["results"]]


def _keep(run: Path, results: Sequence[TaskResult]) -> None:
    with locked(run / FOLDER):
        together = {one.key: one for one in (*read_results(run), *results)}
        write_json(
            run / FOLDER / FILE_NAME, {"format": FORMAT, "results": [to_plain(one) for one in together.values()]}
        )


def table(results: Sequence[TaskResult]) -> Table:
    """A line per task and metric, its value with the standard error."""
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("task", "metric", "value", "±", "questions", "shots"):
        shown.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=True)
    for result in results:
        for name, value in result.metrics.items():
            if not name.endswith("_stderr"):
                error = result.metrics.get(f"{name}_stderr")
                spread = "" if error is None else f"{error:.4f}"
                shown.add_row(result.task, name, f"{value:.4f}", spread, f"{result.questions:,}", str(result.shots))
    return shown

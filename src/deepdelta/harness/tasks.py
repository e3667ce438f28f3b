"""The tasks that a run is measured on: lm-eval's by name where their data are, and small sets that ship with this."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from deepdelta.data.hub import offline_without_network
from deepdelta.errors import UserError, unknown


class Public(NamedTuple):
    """A task of lm-eval whose data are fetched from the Hugging Face hub, or lie in a folder."""

    about: str
    file: str
    """Its file in lm-eval's own folder of tasks: to list them all takes lm-eval many seconds."""
    data: str
    """The data set repository on the hub."""


PUBLIC = {
    "arc_easy": Public("questions of school science", "arc/arc_easy.yaml", "allenai/ai2_arc"),
    "arc_challenge": Public("the harder ones of them", "arc/arc_challenge.yaml", "allenai/ai2_arc"),
    "hellaswag": Public("which sentence goes on", "hellaswag/hellaswag.yaml", "Rowan/hellaswag"),
    "piqa": Public("what works in the physical world", "piqa/piqa.yaml", "baber/piqa"),
    "winogrande": Public("whom a pronoun means", "winogrande/default.yaml", "allenai/winogrande"),
    "openbookqa": Public("questions with a fact of science", "openbookqa/openbookqa.yaml", "allenai/openbookqa"),
    "sciq": Public("exams of science, with a text", "sciq/sciq.yaml", "allenai/sciq"),
    "boolq": Public("yes or no, with a text", "super_glue/boolq/default.yaml", "aps/super_glue"),
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
OWN: dict[str, dict[str, Any]] = {
    "deepdelta_words": CHOICE | {"about": "24 sentences and which word ends each"},
    "deepdelta_python": CHOICE | {"about": "16 beginnings of Python and which goes on"},
    "deepdelta_repeat": {
        "about": "16 lines to be written once more",
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "deepdelta_prose": {
        "about": "6 paragraphs, in bits per byte",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": name, "higher_is_better": False} for name in ("bits_per_byte",)
        ],
    },
}
"""Made for this package, so that the whole way runs without a network. Too small to compare models by."""


def known() -> dict[str, str]:
    """The names that messages list, and what each is."""
    return {name: settings["about"] for name, settings in OWN.items()} | {
        name: one.about for name, one in PUBLIC.items()
    }


def loaded(names: Iterable[str], folder: Path | None) -> dict[str, Any]:
    """The tasks with their data, as lm-eval's `evaluate` takes them.

    Args:
        folder: where copies of the hub's data sets lie, each under its name there: `folder/allenai/ai2_arc`.

    Raises:
        UserError: no such task; its data are neither in the folder, nor kept from before, nor to be fetched.
    """
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    listed = lm_eval.tasks.TaskManager(include_defaults=False)
    merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(names):
        spec: Any = _own(name) if name in OWN else name
        if name in PUBLIC:
            spec = str(home / PUBLIC[name].file)
        elif name not in OWN:
            listed = lm_eval.tasks.TaskManager()
            if name not in listed.all_tasks:
                raise unknown("task", name, known(), "Any task of lm-eval is taken. ")
        for part, held in _with_data(listed, spec, name, folder).items():
            merged[part].update(held)
    return merged


def _with_data(manager: Any, spec: Any, name: str, folder: Path | None) -> Any:
    import datasets.config  # noqa: F401
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    source = PUBLIC[name].data if name in PUBLIC else "NAME"
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-data must be a folder with copies of data sets, got {folder}.")
    try:
        # `datasets` takes a folder of the data set's name for it, if there is one where the process is at work.
        with quiet(), nullcontext() if folder is None else chdir(folder), offline_without_network():
            return manager.load([spec])
    # What `datasets` and the hub's client raise without a network, and for a copy that is not whole.
    except (OSError, ValueError, OfflineModeIsEnabled, HfHubHTTPError, DatasetsError) as error:
        place = folder or Path("FOLDER")
        first = str(error).partition("\n")[0]
        raise UserError(
            f"the data of {name} are not here and cannot be fetched ({type(error).__name__}: {first}). Without a "
            f"network, place a copy of the data set repository {source} of the Hugging Face hub at {place / source} "
            f"and give --task-data {place}; or take tasks whose data ship: {', '.join(OWN)}."
        ) from error


def _own(name: str) -> dict[str, Any]:
    settings = {key: value for key, value in OWN[name].items() if key != "about"}
    return {
        "task": name,
        "test_split": "test",
        "custom_dataset": lambda **_: _rows(name),
        "metadata": {"version": 1},
    } | settings


def _rows(name: str) -> Any:
    import datasets

    file = resources.files("deepdelta.harness") / "sets" / f"{name.removeprefix('deepdelta_')}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    return datasets.DatasetDict({"test": datasets.Dataset.from_list([json.loads(line) for line in lines])})


@contextmanager
def quiet() -> Iterator[None]:
    """Without what lm-eval logs beside its results."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

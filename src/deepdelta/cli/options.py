"""From the words of the command line to the command and its settings."""

import io
import os
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import tyro
from tyro.conf import subcommand

from deepdelta.cli.comparisons import Bench, Study, Task
from deepdelta.cli.doctor import Doctor
from deepdelta.cli.explore import Explore
from deepdelta.cli.export import Export
from deepdelta.cli.plan import Plan
from deepdelta.cli.prepare import Prepare
from deepdelta.cli.runs import Audit, Evaluate, Generate, Import, Train
from deepdelta.cli.watch import Watch
from deepdelta.errors import UserError, check_utf8, nearest
from deepdelta.files import read_object
from deepdelta.nn.config import Rule, refuse_unused
from deepdelta.training import TrainConfig
from deepdelta.training.config import run_settings
from deepdelta.training.recipes import recipe

COMMANDS = {
    "train": Train,
    "evaluate": Evaluate,
    "generate": Generate,
    "audit": Audit,
    "explore": Explore,
    "prepare": Prepare,
    "study": Study,
    "task": Task,
    "watch": Watch,
    "import": Import,
    "export": Export,
    "plan": Plan,
    "doctor": Doctor,
    "bench": Bench,
}


def parse(given: list[str]) -> Any:
    """The command that these words are, ready to be called; paths with a leading ~ lie in the home directory.

    Raises:
        UserError: no such command, or settings that do not go together.
        SystemExit: help was asked for, or tyro has said what is wrong with an option.
    """
    command = _parse(given)
    if isinstance(command, Train):
        refuse_unused(command.settings.model.residual, _residual_given(given, command.config), "train")
    # Shells leave the ~ of --out=~/runs alone.
    return replace(command, **{name: _home(path) for name, path in vars(command).items() if isinstance(path, Path)})


def _parse(given: list[str]) -> Any:
    for word in given:
        check_utf8("every argument", word)
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        raise UserError(f"there is no command '{given[0]}'; {nearest(given[0], COMMANDS)}")
    defaults: dict[str, Any] = {}
    if given[:1] == ["train"]:
        defaults["train"] = Train(run=tyro.MISSING, settings=_settings(given))
    kinds = tuple(
        Annotated[kind, subcommand(name, default=defaults[name]) if name in defaults else subcommand(name)]
        for name, kind in COMMANDS.items()
    )
    description = "Delta residuals, trained against their controls. `deepdelta study` alone lists the named studies."
    commands: Any = Union[kinds]  # noqa: UP007
    parse = partial(tyro.cli, commands, prog="deepdelta", description=description, args=given)
    try:
        with redirect_stderr(io.StringIO()):
            return parse(console_outputs=False)
    except SystemExit as ended:
        # What a setting's own check says is behind the exit: tyro words it with names of its own.
        error: BaseException | None = ended
        while error is not None:
            if isinstance(error, UserError):
                raise error from None
            error = error.__context__
    return parse()  # once more, for the help or what tyro says of the options themselves


def _home(path: Path) -> Path:
    return Path(os.path.expanduser(path))


def _value_of(option: str, given: list[str]) -> str | None:
    """The value of an option that decides the defaults of the others, so must be known before they are parsed."""
    for position, word in enumerate(given):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and position + 1 < len(given):
            return given[position + 1]
    return None


def _residual_given(given: list[str], file: Path | None) -> set[str]:
    """The residual's settings that were typed, or stand in the file where no typed preset or rule replaces them."""
    before = "--model.residual."
    typed = [word.removeprefix(before).partition("=")[0] for word in given if word.startswith(before)]
    names = {name.removeprefix("no-").replace("-", "_") for name in typed}
    if file is not None and "rule" not in names and _value_of("--preset", given) is None:
        names |= read_object(_home(file), "mend it").get("model", {}).get("residual", {}).keys()
    return names


def _settings(given: list[str]) -> TrainConfig:
    """What the settings are before the options: those of --recipe, over them those of --config, the residual that of
    --preset or of a typed rule."""
    options = ("--recipe", "--config", "--preset", "--model.residual.rule")
    named, file, preset, rule = (_value_of(option, given) for option in options)
    typed = {"preset": preset, "rule": rule if rule in get_args(Rule) else None}
    residual = {name: value for name, value in typed.items() if value is not None}
    layer = {"model": {"residual": residual}} if residual else {}
    below = {} if file is None else read_object(_home(Path(file)), "mend it, or give another --config")
    return run_settings({} if named is None else recipe(named), below, layer, where=file or "")

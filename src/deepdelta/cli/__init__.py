"""The command `deepdelta`: the only package that knows every other."""

import io
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from safetensors import SafetensorError

from deepdelta import interruption
from deepdelta.cli.options import COMMANDS, parse
from deepdelta.errors import Told, UserError, printable
from deepdelta.version import __version__

__all__ = ["COMMANDS", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exit code 0, or 2 for an error that is the user's to mend, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    interruption.imported()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of ASCII shows what it can
    try:
        if given == ["--version"]:
            print(f"deepdelta {__version__}")
        else:
            parse(given)()
        print(end="", flush=True)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Told:
        sys.exit(2)
    except (UserError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if (message := _in_one_line(error)) is None:
            raise
        Console(stderr=True, soft_wrap=True).print(f"error: {printable(message)}", markup=False, highlight=False)
        sys.exit(2)


def _in_one_line(error: Exception) -> str | None:
    """What the user is told of an error that is theirs to mend, or their machine's; None for one that is ours."""
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror or error}"
    # torch has a class for a GPU's memory alone.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        first = str(error).partition("\n")[0]
        return f"there is not enough memory: make the model or the batch smaller. {first}".strip()
    return None if isinstance(error, RuntimeError) else str(error)

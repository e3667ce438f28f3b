"""The one exception that is the user's to mend, and the search for the name they meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What must hold does not: the message says what must hold, what came and what to do.

    The command line prints it without a traceback and exits with code 2. Names come from files and folders that others
    may have made, so what a terminal would obey is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with all but line breaks and what can be seen escaped as in a Python string, "\\x1b" for an escape."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode("ascii") for one in text
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase naming the known name closest to `name`, or all known names where none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known are: {', '.join(options)}."


def without_extra(what: str, extra: str, error: ModuleNotFoundError) -> UserError:
    """What to raise where a package of an optional extra is absent; `what`, in the plural, needs it."""
    return UserError(
        f"{what} need the extra '{extra}', but the package {error.name} is absent: "
        f"install it with pip install 'deep-delta-learning[{extra}]'"
    )

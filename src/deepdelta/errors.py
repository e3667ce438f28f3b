"""The one exception that is the user's to mend, and the search for the name they meant."""

import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping

from deepdelta.releases import check_tested

# Control characters but tab and line break, line and paragraph separators, what turns the direction of text, halves of
# surrogate pairs, and the two that are no characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


class UserError(ValueError):
    """What must hold does not: the message says what must hold, what came and what to do.

    The command line prints it without a traceback and exits with code 2. Names come from files and folders that others
    may have made, so what a terminal would obey is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Told(UserError):
    """What another process of the same run has said already: it ends this one, without a line of its own."""


def printable(text: str) -> str:
    """The text with what a terminal would obey and XML cannot hold escaped as in a Python string: `\\x1b`."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase naming the known name closest to `name`, or all known names where none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known are: {', '.join(options)}."


def check_utf8(what: str, name: str) -> None:
    """Raise a UserError for a name with bytes that are not UTF-8: no settings file could hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode("utf-8", "backslashreplace").decode()
        if (encoding := sys.getfilesystemencoding()) != "utf-8":
            message = f"{what} must be in the locale's encoding, {encoding}, got '{shown}'; set PYTHONUTF8=1 for UTF-8."
            raise UserError(message) from None
        raise UserError(f"{what} must be UTF-8, got '{shown}'; give another.") from None


def unknown(kind: str, name: str, known: Mapping[str, str], more: str = "") -> UserError:
    """What to raise for a name that is none of `known`, which are listed with what they are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return UserError(f"there is no {kind} '{name}'{hint} {more}Known are:\n{listing(known)}")


def listing(known: Mapping[str, str]) -> str:
    """Names and what they are, one a line."""
    width = max(map(len, known))
    return "\n".join(f"  {name:<{width}}  {what}" for name, what in known.items())


def require(what: str, extra: str, *modules: str) -> None:
    """Refuse at its beginning what needs modules of an optional extra, if only at its end; `what` is a plural. Releases
    that the tests do not know are warned of.

    Raises:
        UserError: one of the modules is absent.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise without_extra(what, extra, ModuleNotFoundError(name=module))
        check_tested(module)


def without_extra(what: str, extra: str, error: ModuleNotFoundError) -> UserError:
    """What to raise where a package of an optional extra is absent; `what`, in the plural, needs it."""
    return UserError(
        f"{what} need the extra '{extra}', but the package {error.name} is absent: "
        f'install it with pip install "deep-delta-learning[{extra}]", in a clone with pip install -e ".[{extra}]"'
    )

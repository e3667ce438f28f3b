"""Jinja's templates of a package, every value escaped and without control characters."""

from typing import Any

from deepdelta.errors import printable, without_extra


def templates(package: str) -> Any:
    """The environment of the templates in a package's folder `templates`; a value that is missing is an error.

    Raises:
        UserError: the extra `study` (Jinja2) is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise without_extra("pages and pictures", "study", error) from None
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Text alone: what is marked up already, and what is missing, are left for Jinja.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )

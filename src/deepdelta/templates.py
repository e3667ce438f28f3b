"""Jinja's templates of a package, every value escaped."""

from typing import Any

from deepdelta.errors import without_extra


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
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

"""The page that derives the method is a program: every fact on it is checked."""

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "method.md"


def test_every_statement_of_the_method_page_holds():
    options = doctest.ELLIPSIS | doctest.REPORT_NDIFF
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=options, encoding="utf-8")
    assert result.failed == 0
    assert result.attempted > 60

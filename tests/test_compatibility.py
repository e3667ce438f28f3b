"""The page of what works with what says what the tests are marked with."""

import compatibility


def test_the_table_is_that_of_the_tests() -> None:
    text = compatibility.PAGE.read_text(encoding="utf-8")
    assert compatibility.table() in text, "python tests/compatibility.py writes it anew"
    assert text.count(compatibility.HEAD) == 1 and compatibility.HEADING in text


def test_marks_are_found_where_pytest_finds_them() -> None:
    lines = compatibility.table().splitlines()
    named = [line for line in lines if "test_compatibility.py" in line]
    assert not named and len(lines) == len(set(lines)) > 3
    source = "@pytest.mark.home\n@pytest.mark.compatible('a', 'b')\ndef f(): ..."
    decorators = compatibility.ast.parse(source).body[0].decorator_list  # type: ignore[attr-defined]
    found = [mark for one in decorators for mark in compatibility.marks(one)]
    assert found == [("home", []), ("compatible", ["a", "b"])]

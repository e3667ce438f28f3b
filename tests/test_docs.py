"""The pages cannot rot: their examples run, their tables equal the code, their links lead somewhere."""

import ast
import dataclasses
import doctest
import pkgutil
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from deepdelta import PRESETS, GPTConfig, ResidualConfig
from deepdelta.nn.config import ILLEGAL
from deepdelta.training import TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS, NUMBERS, AUDIT = DOCS / "settings.md", DOCS / "numbers.md", DOCS / "audit.md"
PARTS = sorted((DOCS / "parts").glob("*.md"))
ROOTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md"]
PAGES = [*ROOTS, *sorted(DOCS.glob("*.md")), *PARTS]
SETTING_COLUMNS = ["setting", "value", "meaning", "source", "default", "deviation"]

# Which part's page explains the choices of a field.
PAGE_OF = {
    "rule": "rules",
    "direction": "direction",
    "direction_pool": "direction",
    "direction_norm": "direction",
    "target": "target",
    "gate": "gate",
    "gate_range": "gate",
    "expansion": "expansion",
    "compression": "compression",
    "compression_init": "compression",
    "compression_sharing": "compression",
    "norm": "stream",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def tables(page: Path) -> list[list[list[str]]]:
    """Every table as rows of cells, the header first and the rule below it left out."""
    blocks = re.findall(r"(?:^\|.*\n)+", text_of(page), re.MULTILINE)
    found = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    for rows in found:
        assert set("".join(rows.pop(1))) == {"-"}
        assert len({len(row) for row in rows}) == 1, f"{name_of(page)}: ragged table {rows[0]}"
    return found


def table(page: Path, *first_columns: str) -> list[list[str]]:
    """The rows below the header of the one table whose header starts so."""
    (rows,) = [rows for rows in tables(page) if rows[0][: len(first_columns)] == list(first_columns)]
    return rows[1:]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def settings_rows() -> dict[str, list[dict[str, str]]]:
    rows: dict[str, list[dict[str, str]]] = {}
    for found in tables(SETTINGS):
        if found[0][0] == "setting":
            assert found[0] == SETTING_COLUMNS
            for cells in found[1:]:
                (name,) = quoted(cells[0])
                rows.setdefault(name, []).append(dict(zip(SETTING_COLUMNS, cells, strict=True)))
    return rows


ROWS = settings_rows()
FIELDS = {**get_type_hints(ResidualConfig), **get_type_hints(GPTConfig)}
DEFAULTS = {f.name: getattr(kind(), f.name) for kind in (ResidualConfig, GPTConfig) for f in dataclasses.fields(kind)}
LITERALS = [name for name, kind in FIELDS.items() if get_args(kind) and type(None) not in get_args(kind)]


# What x-transformers uses when it is imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "page", [SETTINGS, AUDIT, DOCS / "migration.md", DOCS / "transformers.md", *PARTS], ids=name_of
)
def test_examples(page: Path) -> None:
    options = doctest.ELLIPSIS | doctest.REPORT_NDIFF
    result = doctest.testfile(str(page), module_relative=False, optionflags=options, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0


def test_every_setting_has_its_rows_and_no_other_has() -> None:
    fields = [field.name for kind in (ResidualConfig, GPTConfig) for field in dataclasses.fields(kind)]
    assert len(fields) == len(set(fields))
    assert set(ROWS) == set(fields)


@pytest.mark.parametrize("name", LITERALS)
def test_every_choice_has_a_row_and_the_default_is_marked(name: str) -> None:
    choices = [quoted(row["value"]) for row in ROWS[name]]
    assert sorted(choices) == sorted([str(choice)] for choice in get_args(FIELDS[name]))
    marked = [(quoted(row["value"]), quoted(row["default"])) for row in ROWS[name] if row["default"]]
    assert marked == [([str(DEFAULTS[name])], [str(DEFAULTS[name])])]


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in LITERALS])
def test_values_and_default(name: str) -> None:
    (row,) = ROWS[name]
    (default,) = quoted(row["default"])
    expected = PRESETS[default] if name == "residual" else ast.literal_eval(default)
    assert (type(expected), expected) == (type(DEFAULTS[name]), DEFAULTS[name])
    hint = get_type_hints(ResidualConfig, include_extras=True).get(name)
    if bounds := getattr(hint, "__metadata__", ()):
        assert tuple(float(limit) for limit in row["value"].split(" to ")) == (bounds[0].ge, bounds[0].le)
    elif FIELDS[name] is bool:
        assert quoted(row["value"]) == ["True", "False"]
    elif type(None) in get_args(FIELDS[name]):
        assert row["value"].endswith(", or `None`")


@pytest.mark.parametrize("name", FIELDS)
def test_every_row_says_what_and_whence(name: str) -> None:
    for row in ROWS[name]:
        assert row["meaning"]
        assert row["deviation"]
        assert set(re.sub(r" \(.*\)", "", row["source"]).split(", ")) <= {"text", "v1", "code", "reference", "ours"}


def test_the_choices_are_explained_on_the_pages_of_the_parts() -> None:
    assert sorted(PAGE_OF) == sorted(LITERALS)
    for name, page in PAGE_OF.items():
        text = (DOCS / "parts" / f"{page}.md").read_text(encoding="utf-8")
        for choice in get_args(FIELDS[name]):
            assert f"`{choice}`" in text or f'{name}="{choice}"' in text, f"{page}.md lacks {name}={choice}"


def test_presets_and_exactly_what_they_set() -> None:
    bare = ResidualConfig()
    names = [quoted(row[0])[0] for row in table(SETTINGS, "preset", "sets")]
    assert names == list(PRESETS)
    for _, sets, model, deviation in table(SETTINGS, "preset", "sets"):
        preset = PRESETS[names.pop(0)]
        changed = {
            f"{field.name}={getattr(preset, field.name)!r}"
            for field in dataclasses.fields(preset)
            if getattr(preset, field.name) != getattr(bare, field.name)
        }
        assert set(quoted(sets)) == changed
        assert model and deviation
        assert set(quoted(deviation)) <= set(FIELDS) | set(PRESETS)


def test_illegal_combinations() -> None:
    assert table(SETTINGS, "combination", "reason") == [[illegal.settings, illegal.reason] for illegal in ILLEGAL]


def test_the_differences_follow_from_the_published_numbers() -> None:
    columns = next(rows[0] for rows in tables(NUMBERS) if rows[0][0] == "model")
    published = {row[0]: dict(zip(columns, row, strict=True)) for row in table(NUMBERS, *columns)}
    base = published["additive baseline"]
    derived = next(rows for rows in tables(NUMBERS) if rows[0][0] == "model" and rows[0] != columns)
    assert [row[0] for row in derived[1:]] == [name for name in published if name != "additive baseline"]
    for row in derived[1:]:
        for column, cell in list(zip(derived[0], row, strict=True))[1:]:
            there = published[row[0]][column]
            if there == "-":
                assert cell == "-"
            elif column.startswith("loss"):
                assert cell == f"{float(there) - float(base[column]):+.4f}"
            else:
                assert cell == f"{float(there) / float(base[column]):.2f}"


def test_the_budget_named_beside_the_numbers() -> None:
    config, text = TrainConfig(), " ".join(NUMBERS.read_text(encoding="utf-8").split())
    assert f"{config.steps:,} steps of {config.batch_size} x {config.model.context} tokens" in text
    assert f"{config.steps * config.batch_size * config.accumulate * config.model.context / 1e6:.1f} million" in text


def test_every_promise_names_a_test_that_there_is() -> None:
    for promise, test, _ in table(DOCS / "reliability.md", "promise"):
        file, _, name = quoted(test)[0].partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), promise


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    without_code = re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", text_of(page))
    return re.findall(r"\]\(([^)\s]+)\)", without_code)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://arxiv.org/"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.is_file(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link} has no such heading"


def test_docstrings_cite_headings_that_exist() -> None:
    for file in sorted((ROOT / "src").glob("**/*.py")):
        for path, anchor in re.findall(r"(docs/[\w/-]+\.md)(?:#([\w-]+))?", file.read_text(encoding="utf-8")):
            page = ROOT / path
            assert page.is_file(), f"{name_of(file)}: {path}"
            assert not anchor or anchor in anchors(page), f"{name_of(file)}: {path}#{anchor}"


def test_every_part_is_linked_from_the_settings_or_their_pages() -> None:
    reached, queue = set(), [SETTINGS]
    while queue:
        page = queue.pop()
        reached.add(page)
        found = {(page.parent / link.partition("#")[0]).resolve() for link in links(page) if ".md" in link}
        queue += [target for target in found - reached if target.is_relative_to(DOCS)]
    assert {SETTINGS, NUMBERS, DOCS / "method.md", *PARTS} <= reached


@pytest.mark.parametrize("page", [SETTINGS, NUMBERS, AUDIT, *PARTS], ids=name_of)
def test_names_of_the_library_exist(page: Path) -> None:
    names = re.findall(r"`(deepdelta(?:\.\w+)+)", text_of(page))
    for name in names:
        pkgutil.resolve_name(name)


def test_what_tells_to_install_by_name_tells_it_for_a_clone_too() -> None:
    """An index may not have the distribution yet."""
    sources = [*PAGES, *(ROOT / "src").rglob("*.py")]
    texts = {name_of(page): page.read_text("utf-8") for page in sources}
    wrong = [
        name for name, text in texts.items() if re.search(r"install.*deep-delta-learning", text) and " -e " not in text
    ]
    assert not wrong

"""README and docs state what was recorded in docs/data (tests/recorded.py), and the picture shows it."""

import re

import pytest
import recorded
from picture import THEMES, choose_figures, digest
from recorded import NOT_PROSE, ROOT, TABLES, compare, write_tables

ANY_NUMBER = re.compile(r"\d+")


@pytest.mark.parametrize("page", TABLES)
def test_figures(page: str, request: pytest.FixtureRequest) -> None:
    """`make docs-generated` writes the tables; a figure that differs from the recorded run fails here."""
    path = ROOT / page
    if request.config.getoption("--write-docs"):
        path.write_text(write_tables(path.read_text(), page))
    assert compare(path.read_text(), page) == []


def test_every_number_of_the_readme_is_known() -> None:
    assert compare((ROOT / "README.md").read_text(), "README.md", ANY_NUMBER) == []


def test_a_changed_digit_is_found() -> None:
    """Each digit of the README that is not in code or a link, one after the other."""
    text = (ROOT / "README.md").read_text()
    parts = re.finditer(rf"<!-- table: (\w+) -->.*?<!-- end of \1 -->|{NOT_PROSE.pattern}", text, re.DOTALL)
    skipped = {place for part in parts if part[1] is None for place in range(*part.span())}
    places = [found.start() for found in re.finditer(r"\d", text) if found.start() not in skipped]
    assert len(places) > 150
    for place in places:
        changed = f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
        assert compare(changed, "README.md", ANY_NUMBER), text[place - 30 : place + 10]


@pytest.mark.parametrize("page", [page for page in TABLES if page != "README.md"])
def test_a_changed_table_is_found(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in TABLES[page]:
        start = text.index(f"<!-- table: {name} -->")
        digit = re.compile(r"\d(?= )").search(text, start)
        assert digit is not None
        changed = f"{text[: digit.start()]}{(int(digit[0]) + 1) % 10}{text[digit.end() :]}"
        assert f"table {name}" in compare(changed, page)


@pytest.mark.parametrize("theme", THEMES)
def test_the_picture_shows_what_was_recorded(theme: str) -> None:
    """Draw it again with `python bench/picture.py`."""
    picture = (ROOT / "docs" / "pictures" / f"size-quality-{theme}.svg").read_text()
    assert digest(choose_figures()) in picture


def test_runs_say_where_they_come_from() -> None:
    for name in ("quality", "healing", "heal_heads", "performance", "compress", "study", "engines", "whole_way"):
        text = recorded.DATA.joinpath(f"{name}.json").read_text()
        assert all(f'"{key}"' in text for key in ("commit", "machine", "command", "date")), name


def test_no_type_gives_a_wrong_result() -> None:
    types = recorded.load("zoo")["types"]
    assert all(row.get("passed") or row.get("reason") for row in types.values())
    assert not any(
        "passed" in row["attention"] and not row["attention"]["passed"] for row in types.values() if "attention" in row
    )


def test_the_whole_way_was_gone() -> None:
    ways = recorded.load("whole_way")["ways"]
    assert all(isinstance(seconds, float) for row in ways.values() for seconds in row.values())
    assert all(list(row)[-1] == "load from the Hub" for row in ways.values())


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (recorded.ROOT / "mkdocs.yml").read_text()
    for page in (recorded.ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in navigation, page.name

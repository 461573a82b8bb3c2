"""docs/ray-compatibility.md: every row says what both do, and names tests that exist."""

import re

import pytest

from tests.docs import pages

PAGE = pages.ROOT / "docs" / "ray-compatibility.md"
COLUMNS = ["Ray Serve", "millstream", "Test"]
TITLES = pages.headings(PAGE)[1:]


@pytest.mark.parametrize("title", TITLES)
def test_every_row_is_complete_and_its_tests_exist(title: str) -> None:
    rows = pages.table(PAGE, title)

    assert list(rows[0]) == COLUMNS
    assert [row for row in rows if not all(row.values())] == []
    assert [row["Ray Serve"] for row in rows if row["Test"] != "-" and not pages.tests_named(row["Test"])] == []
    assert [
        f"{file}::{name}"
        for row in rows
        for file, name in pages.tests_named(row["Test"])
        if not pages.is_test(file, name)
    ] == []


def test_nothing_in_a_cell_of_tests_was_overlooked() -> None:
    cells = [row["Test"] for title in TITLES for row in pages.table(PAGE, title)]

    assert [cell for cell in cells if cell != "-" and re.sub(r"`[\w/.]+::\w+`(, )?", "", cell)] == []


def test_what_is_not_there_says_why() -> None:
    rows = [row for title in TITLES for row in pages.table(PAGE, title)]

    assert [row for row in rows if re.match("not there(?!:)", row["millstream"])] == []

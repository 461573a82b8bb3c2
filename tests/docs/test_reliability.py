"""docs/reliability.md: every row says what we do, and names tests that exist; what is not there stands apart."""

import pytest

from tests.docs import pages

PAGE = pages.ROOT / "docs" / "reliability.md"
MEASURED = ("Chaos", "Beside others")  # have tables of figures instead
TITLES = [title for title in pages.headings(PAGE)[1:] if title not in MEASURED]


@pytest.mark.parametrize("title", TITLES)
def test_every_row_is_complete_and_its_tests_exist(title: str) -> None:
    rows = pages.table(PAGE, title)

    assert list(rows[0]) == ["Elsewhere", "millstream", "Test"]
    assert [row for row in rows if not all(row.values())] == []
    assert [
        f"{f}::{name}" for row in rows for f, name in pages.tests_named(row["Test"]) if not pages.is_test(f, name)
    ] == []


@pytest.mark.parametrize("title", [title for title in TITLES if title != "Not there yet"])
def test_what_is_promised_has_a_test(title: str) -> None:
    rows = pages.table(PAGE, title)

    assert [row["Elsewhere"] for row in rows if not pages.tests_named(row["Test"])] == []
    assert [row["Elsewhere"] for row in rows if row["millstream"].startswith("not there")] == []

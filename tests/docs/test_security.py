"""docs/security.md: every test that it names is there, and every table says what shows its claims."""

import re

import pytest

from tests.docs import pages

PAGE = pages.ROOT / "docs" / "security.md"


def test_tests_that_it_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/.]+\.py)::(test_\w+)`", PAGE.read_text())

    assert len(named) > 20
    assert [f"{file}::{name}" for file, name in named if not pages.is_test(file, name)] == []


@pytest.mark.parametrize("title", ["Who can do what", "What is signed", "What garbage leads to"])
def test_every_row_names_what_shows_it(title: str) -> None:
    rows = pages.table(PAGE, title)

    assert [row for row in rows if not (pages.tests_named(row["Test"]) or row["Test"] == "-")] == []

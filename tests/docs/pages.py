"""The pages of the documentation, and what can be read out of them: code blocks and tables."""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
KEYSPACE = ROOT / "docs" / "keyspace.md"
INTERNALS = ROOT / "docs" / "internals.md"
DECISIONS = ROOT / "docs" / "decisions"
PAGES = (README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCE = re.compile(r"^```(\w*)$")
_HEADING = re.compile(r"^#{1,6} +(.*)$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced code block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The fenced blocks of a page, of these languages if any are named."""
    start, language, lines = 0, "", list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if fence is None:
            lines.append(line)
        elif not start:
            start, language, lines = number, fence[1], []
        else:
            if not languages or language in languages:
                yield Block(page, start, language, "\n".join(lines) + "\n")
            start = 0
    assert not start, f"{page}: the block that begins in line {start} does not end"


def table(page: Path, heading: str, number: int = 1) -> list[dict[str, str]]:
    """The first (or so-and-so-many-th) table under a heading: one dict per row, by the names in its first line."""
    (names, _, *rows) = _tables(page, heading)[number - 1]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _tables(page: Path, heading: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    is_there, was_row = False, False
    for line in page.read_text().splitlines():
        is_row = line.startswith("|")
        if title := _HEADING.match(line):
            is_there = title[1] == heading
        elif is_there and is_row:
            if not was_row:
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        was_row = is_row
    assert found, f"{page} has no table under {heading!r}"
    return found


def unquoted(cell: str) -> str:
    """A table's cell without its backticks."""
    return cell.replace("`", "")


def headings(page: Path) -> list[str]:
    """All headings of a page that stand outside of code blocks."""
    found, is_code = [], False
    for line in page.read_text().splitlines():
        if _FENCE.match(line):
            is_code = not is_code
        elif not is_code and (heading := _HEADING.match(line)):
            found.append(heading[1])
    return found


def tests_named(cell: str) -> list[tuple[str, str]]:
    """(file, function) of each test that a cell names."""
    return re.findall(r"`(tests/[\w/.]+\.py)::(test_\w+)`", cell)


def is_test(file: str, name: str) -> bool:
    return (ROOT / file).is_file() and name in _functions_in(file)


@functools.cache
def _functions_in(file: str) -> set[str]:
    """The names of the functions at the top level of a file of tests."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}

"""What commands here have in common in their arguments: a mistake is told in one line, before anything is measured."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.peers.report import with_section

T = TypeVar("T")


def told(read: Callable[[str], T]) -> Callable[[str], T]:
    """For `type=`: the text of a ValueError of `read` is what the user is told."""

    def read_or_tell(text: str) -> T:
        try:
            return read(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    return read_or_tell


@told
def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(f"{number} is less than 1")
    return number


def check_page(parser: argparse.ArgumentParser, page: Path, first: str, last: str) -> None:
    """Exit as the parser does unless a section can be written between these two markers of the page."""
    try:
        with_section(page.read_text(), "", first, last)
    except (ValueError, OSError) as e:
        parser.error(f"argument --page: {e}")

"""Examples run as their users run them: programs of their own, in a directory that has no server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.examples.program import Program


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start `python ARGUMENTS`. Whatever it left behind when the test is over is killed, and fails the test."""
    started: list[Program] = []

    def start(*arguments: str) -> Program:
        started.append(Program(tmp_path / f"program-{len(started)}", *arguments))
        return started[-1]

    yield start
    left = {pid for program in started for pid in program.kill()}
    assert not left, f"processes left behind: {left}"

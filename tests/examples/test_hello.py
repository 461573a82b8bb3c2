"""The first lines that anyone runs."""

from collections.abc import Callable

import pytest

from tests.examples.program import ROOT, Program


@pytest.mark.anyio
@pytest.mark.processes
async def test_hello_greets_and_says_nothing_else(run: Callable[..., Program]) -> None:
    hello = run(str(ROOT / "examples" / "hello.py"))

    assert await hello.ends() == 0, hello.output
    assert hello.output == "hello Ada\n"
    assert hello.left_behind() == set()

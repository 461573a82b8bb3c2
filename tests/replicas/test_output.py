"""What replicas print reaches the terminal, line by line, prefixed, and without ever holding up the launcher."""

import asyncio
import io
import os
import threading

import anyio
import pytest

from millstream.replicas.output import MAX_LINE, prefix_of, relay

pytestmark = pytest.mark.anyio


async def relayed(*pieces: bytes, prefix: str = "> ") -> list[str]:
    """What is printed when a replica writes these, one after the other, and ends."""
    read, write = os.pipe()
    target = io.StringIO()
    relaying = asyncio.create_task(relay(read, prefix, target))
    for piece in pieces:
        await asyncio.to_thread(os.write, write, piece)
    os.close(write)
    await asyncio.wait_for(relaying, 5)
    return target.getvalue().splitlines()


async def test_every_line_is_prefixed() -> None:
    assert await relayed(b"one\ntwo\n", b"three\n") == ["> one", "> two", "> three"]


async def test_line_that_comes_in_pieces_is_one_line() -> None:
    assert await relayed(b"o", b"n", b"e\ntw", b"o\n") == ["> one", "> two"]


async def test_last_line_needs_no_end() -> None:
    assert await relayed(b"one\ntwo") == ["> one", "> two"]


async def test_empty_lines_stay() -> None:
    assert await relayed(b"one\n\ntwo\n") == ["> one", "> ", "> two"]


async def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert await relayed(b"caf\xc3\xa9 \xff\n") == ["> café �"]


@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE, 1_000_000])
async def test_very_long_line_is_cut_into_several_and_nothing_of_it_is_lost(length: int) -> None:
    lines = await relayed(b"x" * length + b"\nnext\n")

    assert lines[-1] == "> next"
    assert "".join(line.removeprefix("> ") for line in lines[:-1]) == "x" * length
    assert max(len(line) for line in lines) <= 2 * MAX_LINE + 2
    assert "> " not in lines


async def test_terminal_that_stands_still_holds_up_nobody_else() -> None:
    resumed = threading.Event()

    class Stalled(io.StringIO):
        def write(self, text: str) -> int:
            assert resumed.wait(10)
            return super().write(text)

    read, write = os.pipe()
    target = Stalled()
    relaying = asyncio.create_task(relay(read, "> ", target))
    os.write(write, b"one\n")

    with anyio.fail_after(5):
        for _ in range(20):
            await asyncio.sleep(0.005)
    resumed.set()
    os.close(write)

    await asyncio.wait_for(relaying, 5)
    assert target.getvalue() == "> one\n"


async def test_terminal_that_is_gone_is_no_error() -> None:
    read, write = os.pipe()
    target = io.StringIO()
    target.close()
    relaying = asyncio.create_task(relay(read, "> ", target))

    os.write(write, b"one\n")

    await asyncio.wait_for(relaying, 5)
    os.close(write)


def test_prefix_names_deployment_and_replica() -> None:
    assert prefix_of("app.Model", "r-1") == "[app.Model r-1] "

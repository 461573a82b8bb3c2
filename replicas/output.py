"""What replicas print, line by line and prefixed, in the terminal of whoever started them."""

import asyncio
import os
import sys
from typing import TextIO

import anyio
import anyio.to_thread

MAX_LINE = 64 * 1024


async def relay(fd: int, prefix: str, target: TextIO) -> None:
    """Copy lines from a pipe to `target` until its other end is closed; longer ones than MAX_LINE are cut into several.

    Written in a thread: a terminal that stands still (Ctrl-S, a pager) holds up what prints, not the launcher's leases.
    """
    reader = asyncio.StreamReader(limit=MAX_LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    one_at_a_time, rest = anyio.CapacityLimiter(1), b""

    async def show(lines: list[bytes]) -> None:
        text = "".join(f"{prefix}{line.decode(errors='replace').rstrip()}\n" for line in lines)
        await anyio.to_thread.run_sync(_write, target, text, limiter=one_at_a_time, abandon_on_cancel=True)

    try:
        while data := await reader.read(MAX_LINE):
            *lines, rest = (rest + data).split(b"\n")
            while len(rest) > MAX_LINE:
                lines.append(rest[:MAX_LINE])
                rest = rest[MAX_LINE:]
            if lines:
                await show(lines)
        if rest:
            await show([rest])
    except (BrokenPipeError, ValueError):
        pass  # the terminal has gone: the replicas go on
    finally:
        transport.close()


def _write(target: TextIO, text: str) -> None:
    target.write(text)
    target.flush()


def prefix_of(tag: str, replica: str) -> str:
    text = f"[{tag} {replica}] "
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text

"""What replicas print, line by line and prefixed, in the terminal of whoever started them."""

import asyncio
import os
import sys
from typing import TextIO

MAX_LINE = 64 * 1024


async def relay(fd: int, prefix: str, target: TextIO) -> None:
    """Copy lines from a pipe to `target` until its other end is closed; longer ones than MAX_LINE are cut into several."""
    reader = asyncio.StreamReader(limit=MAX_LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    try:
        while line := await _line(reader):
            print(f"{prefix}{line.decode(errors='replace').rstrip()}", file=target, flush=True)
    except (BrokenPipeError, ValueError):
        pass  # the terminal has gone: the replicas go on
    finally:
        transport.close()


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as e:
        return e.partial
    except asyncio.LimitOverrunError as e:
        return await reader.read(max(1, e.consumed))


def prefix_of(tag: str, replica: str) -> str:
    text = f"[{tag} {replica}] "
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text

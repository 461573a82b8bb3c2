"""Applications that stream, and that take and make large values. Importable, as an application usually is."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from millstream import serve
from millstream.replicas import streaming


def peak_bytes() -> int:
    """The most memory this process has had since it last called `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@serve.deployment
class Streamer:
    """Counts, and notes in a file what it makes: one line per item, with the pid."""

    def __init__(self, ledger: str = "", reader_gone_s: float = 30.0) -> None:
        self._ledger = ledger
        streaming.READER_GONE_S = reader_gone_s

    async def count(self, n: int, pause_s: float = 0.0) -> AsyncIterator[int]:
        try:
            for number in range(n):
                self._note(str(number))
                yield number
                if pause_s:
                    await asyncio.sleep(pause_s)
        finally:
            self._note("closed")

    def count_in_thread(self, n: int, pause_s: float = 0.0) -> Iterator[int]:
        for number in range(n):
            self._note(str(number))
            yield number
            time.sleep(pause_s)

    async def blobs(self, n: int, size: int, pause_s: float) -> AsyncIterator[bytes]:
        for number in range(n):
            self._note(str(number))
            yield bytes([number]) * size
            await asyncio.sleep(pause_s)

    async def echo(self, value: object) -> object:
        self._note("echo")
        return value

    async def make(self, size: int) -> bytes:
        self._note("make")
        return b"x" * size

    async def pid(self) -> int:
        return os.getpid()

    async def forget_peak(self) -> None:
        forget_peak()

    async def peak_bytes(self) -> int:
        return peak_bytes()

    def _note(self, text: str) -> None:
        if self._ledger:
            with open(self._ledger, "a") as file:
                file.write(f"{text} {os.getpid()}\n")

"""A deployment whose methods stream, and what a stream may leave in the server."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from millstream.broker.connection import Control
from millstream.handles.handle import DeploymentHandle
from tests.helpers import wait_until
from tests.replica_helpers import Gate


class Model:
    """Generators of each kind; `made` and `closed` count what they do."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.made: list[Any] = []
        self.closed = 0
        self.calls = 0

    async def count(self, n: int, pause_s: float = 0.0) -> AsyncIterator[int]:
        self.calls += 1
        try:
            for number in range(n):
                self.made.append(number)
                yield number
                if pause_s:
                    await asyncio.sleep(pause_s)
        finally:
            self.closed += 1

    def count_in_thread(self, n: int, pause_s: float = 0.0) -> Iterator[int]:
        self.calls += 1
        try:
            for number in range(n):
                self.made.append(number)
                yield number
                if pause_s:
                    time.sleep(pause_s)
        finally:
            self.closed += 1

    async def first_then_held(self) -> AsyncIterator[str]:
        try:
            yield "first"
            await self.gate.wait()
            yield "second"
        finally:
            self.closed += 1

    async def fail_after(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number
        raise ValueError("in the middle")

    def fail_after_in_thread(self, n: int) -> Iterator[int]:
        yield from range(n)
        raise ValueError("in the middle")

    async def blobs(self, sizes: list[int]) -> AsyncIterator[bytes]:
        for number, size in enumerate(sizes):
            self.made.append(number)
            yield bytes([number % 256]) * size

    def blobs_in_thread(self, sizes: list[int]) -> Iterator[bytes]:
        for number, size in enumerate(sizes):
            self.made.append(number)
            yield bytes([number % 256]) * size

    async def unpicklable(self) -> AsyncIterator[Any]:
        yield 1
        yield threading.Lock()

    async def returns_generator(self, n: int) -> Any:
        return (number for number in range(n))

    def returns_generator_in_thread(self, n: int) -> Any:
        return (number for number in range(n))

    async def plain(self, value: Any = None) -> Any:
        return value

    def plain_in_thread(self, value: Any = None) -> Any:
        return value

    async def n_made(self) -> int:
        return len(self.made)

    async def n_closed(self) -> int:
        return self.closed

    async def n_calls(self) -> int:
        return self.calls


async def read_to_the_end(stream: Any, pause_s: float = 0.0) -> tuple[list[Any], BaseException | None]:
    """All items, and the error that came after them."""
    items = []
    try:
        async for item in stream:
            items.append(item)
            if pause_s:
                await asyncio.sleep(pause_s)
    except Exception as e:
        return items, e
    return items, None


async def left_behind(redis: Control) -> list[str]:
    """What streams and large values keep in the server while they are needed."""
    kinds = (":items:", ":value:", ":payload:", ":arriving:", ":result:")
    return sorted([key.decode() async for key in redis.scan_iter(count=1000) if any(k in key.decode() for k in kinds)])


async def nothing_is_left(redis: Control) -> None:
    """Wait until all of that is gone."""

    async def check() -> bool:
        return not await left_behind(redis)

    await wait_until(check, what=f"an empty server, not {await left_behind(redis)}")


async def is_closed(handle: DeploymentHandle, times: int = 1) -> None:
    """Wait until so many generators have been closed."""

    async def check() -> bool:
        closed: int = await handle.n_closed.call()
        return closed >= times

    await wait_until(check)

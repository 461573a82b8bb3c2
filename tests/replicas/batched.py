"""A class with batched methods, for the tests of batching."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any

from millstream import serve
from tests.replica_helpers import Gate

NEVER_S = 1000.0  # a batch that waits so long only starts because it is full


def start(*calls: Coroutine[Any, Any, Any]) -> list["asyncio.Task[Any]"]:
    return [asyncio.create_task(call) for call in calls]


async def together(*calls: Awaitable[Any]) -> list[Any]:
    """The values of calls that are made at once."""
    return list(await asyncio.gather(*calls))


async def passes(count: int = 5) -> None:
    """So many passes of the loop: what is about to happen has happened."""
    for _ in range(count):
        await asyncio.sleep(0)


class Model:
    """Remembers its batches, and holds them up at a gate if it is given one."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        if gate is None:
            self.gate.open()
        self.batches: list[list[Any]] = []

    async def handle(self, xs: list[Any]) -> list[Any]:
        self.batches.append(xs)
        await self.gate.wait()
        return [x * 10 for x in xs]

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=NEVER_S)
    async def when_full(self, xs: list[Any]) -> list[Any]:
        """Only full batches."""
        return await self.handle(xs)

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=0.001)
    async def soon(self, xs: list[Any]) -> list[Any]:
        return await self.handle(xs)

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=0)
    async def at_once(self, xs: list[Any]) -> list[Any]:
        return await self.handle(xs)

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=0, max_concurrent_batches=2)
    async def two_at_once(self, xs: list[Any]) -> list[Any]:
        return await self.handle(xs)


class Slotted:
    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: list[int] = []

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def run(self, xs: list[int]) -> list[int]:
        self.seen += xs
        return xs

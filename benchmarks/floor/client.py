"""The floor's client: one XADD per request, many in one write; replies are taken off a list, many at once."""

import asyncio
import itertools
import pickle
from collections.abc import Iterable
from typing import Any

from benchmarks.floor.wire import REPLIES, REQUESTS, Link, connect, pack

AT_ONCE = 32
READ = pack(("BLMPOP", 0, 1, REPLIES, "LEFT", "COUNT", 500))


class Client:
    def __init__(self) -> None:
        self.waiting: dict[bytes, asyncio.Future[Any]] = {}
        self.buffer: list[bytes] = []
        self.is_due = False
        self.numbers = itertools.count()
        self.unconfirmed = 0
        self.commands: Link
        self.replies: Link

    async def start(self, port: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.confirmed = self.loop.create_future()
        self.commands = await connect(port, self.on_added)
        self.replies = await connect(port, self.on_replies)
        self.replies.write(READ)

    async def all(self, values: Iterable[Any]) -> list[Any]:
        return [await future for future in [self.call(value) for value in values]]

    async def submit(self, values: Iterable[Any]) -> None:
        """Return when the server has them."""
        self.confirmed = self.loop.create_future()
        for value in values:
            self.send(b"%08x" % next(self.numbers), (value,), {})
        await self.confirmed

    def call(self, *args: Any, **kwargs: Any) -> "asyncio.Future[Any]":
        ref = b"%08x" % next(self.numbers)
        self.send(ref, args, kwargs)
        future = self.waiting[ref] = self.loop.create_future()
        return future

    def send(self, ref: bytes, args: Any, kwargs: Any) -> None:
        self.buffer.append(pack(("XADD", REQUESTS, "*", "r", ref, "b", pickle.dumps((args, kwargs), 5))))
        if len(self.buffer) >= AT_ONCE:
            self.flush()
        elif not self.is_due:
            self.is_due = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        self.is_due = False
        self.unconfirmed += len(self.buffer)
        self.commands.write(b"".join(self.buffer))
        self.buffer.clear()

    def on_added(self, reply: Any) -> None:
        self.unconfirmed -= 1
        if not self.unconfirmed and not self.buffer and not self.confirmed.done():
            self.confirmed.set_result(None)

    def on_replies(self, reply: Any) -> None:
        self.replies.write(READ)
        for item in reply[1]:
            self.waiting.pop(item[:8]).set_result(pickle.loads(item[8:]))

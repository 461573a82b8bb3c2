"""A TCP proxy between a client and a test server, to lose what a network loses: a reply and not its request, the rest of
a message from any byte on, or just time.

It lives in a thread of its own. What it is told is in force when the call returns.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import hiredis

T = TypeVar("T")


@dataclass(slots=True)
class Limits:
    """When one connection is cut: after so many more bytes of either direction, or before that reply. None: never."""

    sent: int | None = None
    received: int | None = None
    reply: int | None = None


class Proxy:
    """`with Proxy(server.url) as proxy:`, then connect to `proxy.url`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._parts, self._target = parts, (parts.hostname, parts.port)
        self._pairs: set[_Pair] = set()  # that are open
        self._serving: set[asyncio.Task[Any]] = set()
        self._fate: Callable[[], Limits] = Limits
        self._flow = asyncio.Event()
        self.delay_s = 0.0  # before each piece, in both directions
        self.piece = 65536  # bytes that are passed on at a time, at most
        self.accepted = self.cuts = 0
        self.sent = self.received = 0  # bytes, of all connections

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=[self._live(started)], name="proxy")
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return urlunsplit(self._parts._replace(netloc=f"127.0.0.1:{self.port}"))

    def cut_after_sent(self, count: int) -> None:
        """On what is open now: pass so many more bytes on to the server, then close both ends."""
        self._do(lambda: self._limit(lambda: Limits(sent=count)))

    def cut_after_received(self, count: int) -> None:
        """As `cut_after_sent`: all requests pass, and so many more bytes of the replies."""
        self._do(lambda: self._limit(lambda: Limits(received=count)))

    def drop_reply(self, number: int = 1) -> None:
        """As `cut_after_sent`: all requests pass, and the replies before that one, from 1, which is lost."""
        self._do(lambda: self._limit(lambda: Limits(reply=number)))

    def cut_each(self, fate: Callable[[], Limits]) -> None:
        """Every new connection gets limits of its own."""
        self._fate = fate

    def pass_all(self) -> None:
        """No more cuts, delays and pieces. What was held flows again."""

        def heal() -> None:
            self.delay_s, self.piece = 0.0, 65536
            self._fate = Limits
            self._limit(Limits)
            self._flow.set()

        self._do(heal)

    def hold(self) -> None:
        """A black hole: connections are accepted and stay open, and nothing passes until `release`."""
        self._do(self._flow.clear)

    def release(self) -> None:
        self._do(self._flow.set)

    def cut(self) -> int:
        """Close all connections now; how many."""

        def close() -> int:
            found = list(self._pairs)
            for pair in found:
                pair.close()
            return len(found)

        return self._do(close)

    def _limit(self, fate: Callable[[], Limits]) -> None:
        for pair in self._pairs:
            pair.limits = fate()

    def _do(self, work: Callable[[], T]) -> T:
        async def do() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result(10)

    async def _live(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._flow.set()
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = listener.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        listener.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await asyncio.sleep(0)  # for the last transports to be closed

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            there = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        await _Pair(self, (reader, writer), there).run()


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Pair:
    """One client's connection, and the one to the server that stands for it."""

    def __init__(self, proxy: Proxy, client: Ends, server: Ends) -> None:
        self._proxy, self._client, self._server, self._ends = proxy, client, server, (client, server)
        self._replies = hiredis.Reader()
        self.limits = proxy._fate()

    async def run(self) -> None:
        self._proxy._pairs.add(self)
        directions = [
            asyncio.create_task(self._pump(self._client[0], self._server[1], self._may_send)),
            asyncio.create_task(self._pump(self._server[0], self._client[1], self._may_receive)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            self._proxy._pairs.discard(self)
            self.close()
            await asyncio.gather(*[writer.wait_closed() for _, writer in self._ends], return_exceptions=True)
        except asyncio.CancelledError:  # the proxy ends; the stream server would complain of a cancelled handler
            for _, writer in self._ends:
                writer.transport.abort()
        finally:
            for one in directions:
                one.cancel()
            await asyncio.gather(*directions, return_exceptions=True)

    def close(self) -> None:
        for _, writer in self._ends:
            writer.close()  # what was passed on before still arrives

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowed: Callable[[bytes], int]
    ) -> None:
        proxy = self._proxy
        try:
            while data := await reader.read(proxy.piece):
                if proxy.delay_s:
                    await asyncio.sleep(proxy.delay_s)
                await proxy._flow.wait()
                count = allowed(data)
                writer.write(data[:count])
                await writer.drain()
                if self._is_spent:
                    proxy.cuts += 1
                    return
        except OSError:
            return

    @property
    def _is_spent(self) -> bool:
        """A limit is reached. One of 0 is, when the first byte comes that it does not let through."""
        return -1 in (self.limits.sent, self.limits.received, self.limits.reply)

    def _may_send(self, data: bytes) -> int:
        count, self.limits.sent = _within(data, self.limits.sent)
        self._proxy.sent += count
        return count

    def _may_receive(self, data: bytes) -> int:
        if self.limits.reply is not None:
            count = self._before_the_reply(data)
        else:
            count, self.limits.received = _within(data, self.limits.received)
        self._proxy.received += count
        return count

    def _before_the_reply(self, data: bytes) -> int:
        assert self.limits.reply is not None
        for position in range(len(data)):
            if self.limits.reply <= 1:
                self.limits.reply = -1
                return position
            self._replies.feed(data[position : position + 1])
            if self._replies.gets() is not False:
                self.limits.reply -= 1
        return len(data)


def _within(data: bytes, limit: int | None) -> tuple[int, int | None]:
    """How many of these bytes may pass, and what is left of the limit; -1: more came than may pass."""
    if limit is None:
        return len(data), None
    if len(data) > limit:
        return limit, -1
    return len(data), limit - len(data)

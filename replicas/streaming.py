"""The producing half of a stream: runs a generator, sends its items, and waits where its reader is too far behind.

Items that were sent and not acknowledged are sent again after a reconnect; the script keeps what is there already.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from millstream.broker import pickling, scripts
from millstream.broker.codec import Codec
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import Link
from millstream.broker.pickling import Pickled
from millstream.errors import BrokerUnavailableError
from millstream.replicas.large import LargeValues

ASK_AFTER_S = 1.0  # how far the reader is, where no order tells us
READER_GONE_S = 30.0  # a reader that is not connected for so long while its stream waits for it does not come back
AT_ONCE = 100  # items in one call of the script
Place = tuple[str, bytes]


class Emitters:
    """All streams of this replica. `resume` before the finisher does: a result may not overtake its items."""

    def __init__(self, keys: DeploymentKeys, codec: Codec, large: LargeValues, ttl_s: int) -> None:
        self.keys, self.codec, self.large, self.ttl_s = keys, codec, large, ttl_s
        self.link: Link | None = None
        self._emitters: dict[Place, Emitter] = {}

    def open(self, place: Place, ref: bytes, client: bytes, max_ahead: int, lose: Callable[[str], None]) -> "Emitter":
        """`lose(why)` is called, at most once, if nobody wants the items any more: "stale", or "reader gone"."""
        emitter = self._emitters[place] = Emitter(self, place, ref, client, max_ahead, lose)
        return emitter

    def resume(self, link: Link) -> None:
        """There is a connection (again): send what is not acknowledged."""
        self.link = link
        for emitter in list(self._emitters.values()):
            emitter.send_again()

    def was_read(self, place: Place, count: int) -> None:
        """The reader of a stream has read so many of its items."""
        if (emitter := self._emitters.get(place)) is not None:
            emitter.was_read(count)

    def close(self, place: Place) -> None:
        """Nobody wants the rest: whoever produces it is stopped at its next item."""
        if (emitter := self._emitters.pop(place, None)) is not None:
            emitter.close()

    def forget(self, place: Place) -> None:
        self._emitters.pop(place, None)


class Emitter:
    """One stream."""

    def __init__(
        self, all_: Emitters, place: Place, ref: bytes, client: bytes, max_ahead: int, lose: Callable[[str], None]
    ) -> None:
        self._all, self._place, self._ref, self._client = all_, place, ref, client
        self._max_ahead, self._lose = max_ahead, lose
        self._loop = asyncio.get_running_loop()
        self._unacknowledged: list[bytes] = []  # envelopes, the first of them item `_acknowledged`
        self._acknowledged = self._sent = self._count = self._read = 0
        self._is_scheduled = self._has_ended = self._is_closed = False
        self._news = asyncio.Event()
        self._alone_since: float | None = None

    async def run(self, produce: Callable[[], Any], threads: ThreadPoolExecutor, started: Callable[[Any], None]) -> int:
        """Send the items of what `produce()` returns; their number. Raises what the generator raises, and TypeError if it
        is none. `started(job)` is told of the thread's job, where a thread runs it."""
        made = produce()
        if inspect.isawaitable(made):
            made = await made
        if hasattr(made, "__anext__"):
            await self._run_async(made)
        elif hasattr(made, "__next__"):
            await self._run_in_thread(made, threads, started)
        else:
            raise TypeError(
                f"a stream was asked for, and the method returned {type(made).__name__}, not a generator; "
                "call it without stream=True, or have it yield its items"
            )
        return self._count

    async def _run_async(self, generator: Any) -> None:
        try:
            async for item in generator:
                await self._put(item)
        finally:
            if hasattr(generator, "aclose"):
                await generator.aclose()

    async def _run_in_thread(self, generator: Any, threads: ThreadPoolExecutor, started: Callable[[Any], None]) -> None:
        is_over = threading.Event()

        def put(item: Any) -> None:
            future = asyncio.run_coroutine_threadsafe(self._put(item), self._loop)
            future.result()

        def pump() -> None:
            try:
                for item in generator:
                    if is_over.is_set():
                        return
                    put(item)
            finally:
                if hasattr(generator, "close"):
                    generator.close()

        job = threads.submit(copy_context().run, pump)
        started(job)
        try:
            await asyncio.wrap_future(job)
        finally:
            is_over.set()

    async def _put(self, item: Any) -> None:
        if self._is_closed:
            raise asyncio.CancelledError
        number = b"%d" % self._count
        body = pickling.dump_parts(item, f"item {self._count} of a stream of {self._all.codec.tag}")
        if isinstance(body, Pickled):
            envelope = await self._all.large.write_item(self._ref, number, body.snapshot())
        else:
            envelope = self._all.codec.seal("item", self._ref, body, number)
        self._unacknowledged.append(envelope)
        self._count += 1
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self.flush)
        while self._count - self._read >= self._max_ahead and not self._is_closed:
            await self._until_read()

    # sending

    def flush(self) -> None:
        """Send what is not sent yet."""
        self._is_scheduled = False
        link = self._all.link
        if link is None or not link.is_up:
            return
        while self._sent < self._count:
            start = self._sent - self._acknowledged
            batch = self._unacknowledged[start : start + AT_ONCE]
            first, self._sent = self._sent, self._sent + len(batch)
            link.start(self._call(first, batch), lambda reply, upto=self._sent: self._answered(upto, reply))  # type: ignore[misc]

    def end(self) -> None:
        """No more items: what is not sent yet goes out now, ahead of the result."""
        self._has_ended = True
        self.flush()
        self._forget_if_done()

    def close(self) -> None:
        """Take no further items."""
        self._is_closed = True
        self._news.set()

    def send_again(self) -> None:
        self._sent = self._acknowledged
        self.flush()

    def _call(self, first: int, batch: list[bytes]) -> scripts.Call[tuple[bool, int]]:
        lane, entry = self._place
        place = f"{lane} {entry.decode()}"
        return scripts.emit(self._all.keys, self._ref.decode(), place, self._client, self._all.ttl_s, first, batch)

    def _answered(self, upto: int, reply: tuple[bool, int] | Exception) -> None:
        if isinstance(reply, BrokerUnavailableError):
            return  # `send_again` follows
        if isinstance(reply, Exception):
            self._lose(f"refused: {reply}")
            return
        if not reply[0]:
            self._lose("stale")
        if upto > self._acknowledged:
            del self._unacknowledged[: upto - self._acknowledged]
            self._acknowledged = upto
        self._forget_if_done()

    def _forget_if_done(self) -> None:
        if self._has_ended and self._acknowledged == self._count:
            self._all.forget(self._place)

    # waiting for the reader

    def was_read(self, count: int) -> None:
        if count > self._read:
            self._read = count
            self._news.set()

    async def _until_read(self) -> None:
        """Wait for an order that says how far the reader is; ask after a while, and look whether it is still there."""
        self._news.clear()
        try:
            async with asyncio.timeout(ASK_AFTER_S):
                await self._news.wait()
            self._alone_since = None
            return
        except TimeoutError:
            link = self._all.link
        if link is None or not link.is_up:
            return
        try:
            is_running, read = await link.run(self._call(self._count, []))
            if not is_running:
                self._lose("stale")
            self.was_read(read)
            await self._look_for_reader(link)
        except BrokerUnavailableError:
            return  # looked at again in a moment

    async def _look_for_reader(self, link: Link) -> None:
        channel = self._all.keys.reply(self._client.decode())
        _, listeners = await link.ask("PUBSUB", "SHARDNUMSUB", channel)
        now = self._loop.time()
        if listeners:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > READER_GONE_S:
            self._lose("reader gone")

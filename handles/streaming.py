"""Reading the items of a generator method, as they are produced.

The engine brings items as messages; what a lost message or a lost connection leaves out is read from the record. Every so
many items the replica is told how far its reader is, which lets it go on.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Self

from millstream.broker import outcomes
from millstream.errors import BrokerUnavailableError, GetTimeoutError, RefNotFoundError
from millstream.handles import engines
from millstream.handles.engine import Engine
from millstream.handles.generics import T_co
from millstream.handles.route import Route


class StreamCell:
    """What this process knows of one stream: items that have come and are not read yet, and how it ended.

    Filled by the engine on its loop; read from any thread.
    """

    is_private = False  # what it holds is freed by `close`

    def __init__(self, route: Route, ref: bytes, engine: Engine, max_ahead: int) -> None:
        self.codec, self.ref, self.engine, self._route = route.codec, ref, engine, route
        self.since = time.monotonic()
        self._tell_every = max(1, max_ahead // 2)
        self._lock = threading.Lock()
        self._items: dict[int, bytes] = {}  # number -> message
        self._next = 0  # number of the item to be read next
        self._told = 0  # so many items read, as far as the replica knows
        self._stored: bytes | None = None  # how it ended
        self._error: BaseException | None = None
        self._on_news: Callable[[], None] | None = None  # one reader waits at a time
        self._is_reading = False
        self.is_closed = False

    @property
    def ref_id(self) -> str:
        return f"{self.codec.tag}~{self.ref.decode()}"

    @property
    def is_over(self) -> bool:
        return self._stored is not None or self._error is not None

    # filled by the engine

    def settle(self, stored: bytes, large: bytes | None = None) -> None:
        self._stored = stored
        self._tell()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._tell()

    def match(self) -> None:
        """Nobody waits for it."""

    def item(self, stored: bytes) -> None:
        number = int(stored[5 : stored.index(b"\n")])
        with self._lock:
            if number >= self._next:
                self._items[number] = stored
        self._tell()
        if number > self._next and self._next not in self._items:
            self._read_record()  # a message was lost

    def look_again(self) -> bool:
        """It still runs, after a while, or after a reconnect: have we missed something?"""
        if self._next not in self._items:
            self._read_record()
        return False

    def _read_record(self) -> None:
        if not self._is_reading and not self.is_closed:
            self._is_reading = True
            self.engine.chores.start(self._read_items())

    async def _read_items(self) -> None:
        try:
            for stored in await self.engine.chores.read_items(self._route, self.ref, self._next):
                with self._lock:
                    self._items.setdefault(int(stored[5 : stored.index(b"\n")]), stored)
        except BrokerUnavailableError:
            return  # the reconnect looks again
        finally:
            self._is_reading = False
        self._tell()

    def _tell(self) -> None:
        if (news := self._on_news) is not None:
            news()

    # read by whoever iterates

    def take(self) -> bytes | None:
        """The next item, as the message that brought it; None if it has not come yet."""
        with self._lock:
            stored = self._items.pop(self._next, None)
            if stored is None:
                return None
            self._next += 1
            count = self._next
        if count - self._told >= self._tell_every and not self.is_over:
            self._told = count
            self._call(self.engine.chores.consumed, self._route, self.ref, count)
        return stored

    def open(self, stored: bytes, large: bytes | None = None) -> Any:
        """The value of an item. Raises SignatureError."""
        header, _, rest = stored.partition(b"\n")
        return self.codec.open("item", self.ref, rest[:-1] if large is None else large, header[5:])

    def large_part(self, stored: bytes) -> str | None:
        """Of an item in a key of its own: the last part of the key's name."""
        header, _, rest = stored.partition(b"\n")
        return header[5:].decode() if rest[:1] == b"@" else None

    async def read_large(self, part: str) -> bytes:
        """On the engine's loop. Raises RefNotFoundError, BrokerUnavailableError."""
        large = await self.engine.chores.read_large(self._route, self.ref, part)
        if large is None:
            raise outcomes.not_found(self.ref_id, f"item {part} of its stream has expired")
        return large

    def missing(self) -> int:
        """After the end: how many items are still to be read from the record. Raises the request's error if none are."""
        if self._error is not None:
            raise outcomes.same_kind(self._error)
        assert self._stored is not None
        count: int = outcomes.open_stored(self.codec, self.ref, self._stored)
        return count - self._next

    @property
    def has_failed(self) -> bool:
        return self._error is not None or (self._stored is not None and not self._stored.startswith(b"succeeded"))

    @property
    def has_items(self) -> bool:
        """Is the next item here?"""
        return self._next in self._items

    async def read_rest(self) -> None:
        """After the end: read what is stored beyond what has come. On the engine's loop."""
        if self._error is None and not self.has_items:
            for stored in await self.engine.chores.read_items(self._route, self.ref, self._next):
                self._items.setdefault(int(stored[5 : stored.index(b"\n")]), stored)

    def wait_for_news(self, news: Callable[[], None] | None) -> None:
        self._on_news = news

    def close(self) -> None:
        """Nobody reads on: cancel what still runs, free what is stored. Any thread; twice is as once."""
        if self.is_closed:
            return
        self.is_closed = True
        if not self.engine.is_closed:
            self._call(self._close_there)

    def _close_there(self) -> None:
        engine = self.engine
        if not self.is_over:
            engine.endings.cancel_soon([self.ref_id])
        engine.chores.forget_items(self._route, self.ref)
        if self._stored is not None:
            engine.drops.add(self.codec.tag, self.ref, self._stored, self.since)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: nothing more can be sent
            self.engine.loop.call_soon_threadsafe(function, *arguments)


class _Items:
    """What both faces share."""

    def __init__(self, cell: StreamCell) -> None:
        self._cell = cell
        self._has_ended = False

    @property
    def ref_id(self) -> str:
        """The id of the request: for `ObjectRef.from_id(...).status()` or `millstream ref`."""
        return self._cell.ref_id

    def __del__(self) -> None:
        if (cell := self.__dict__.get("_cell")) is not None:
            cell.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._cell.ref_id})"


class AsyncStream(_Items, Generic[T_co]):
    """The items of a generator method, for `async for`. Belongs to the loop that it was made on."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T_co:
        """The next item. Raises the generator's error after the items before it; a cancelled wait loses no item."""
        cell = self._cell
        while not self._has_ended:
            if (stored := cell.take()) is not None:
                part = cell.large_part(stored)
                return cell.open(stored, None if part is None else await cell.read_large(part))  # type: ignore[no-any-return]
            if cell.is_over:
                if cell.has_failed or cell.missing() > 0:
                    await cell.read_rest()
                    if cell.has_items:
                        continue
                self._end()
            else:
                await self._news()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Read no further: a request that still runs is cancelled."""
        self._has_ended = True
        self._cell.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __await__(self) -> Any:
        raise TypeError("a stream is not awaited: write `async for item in stream`, or call without stream=True")

    def _end(self) -> None:
        """After the last item. Raises the request's error, if it has one, once."""
        self._has_ended = True
        self._cell.close()
        _raise_if_short(self._cell)

    async def _news(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._cell.engine.loop:
            raise RuntimeError("a stream belongs to the event loop that it was made on")
        future: asyncio.Future[None] = loop.create_future()
        self._cell.wait_for_news(lambda: None if future.done() else future.set_result(None))
        try:
            await future
        finally:
            self._cell.wait_for_news(None)


class Stream(_Items, Generic[T_co]):
    """The items of a generator method, for `for`. From any thread, one at a time."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T_co:
        """The next item; blocks for it. Raises the generator's error after the items before it."""
        return self.next(None)

    def next(self, timeout: float | None) -> T_co:
        """As `next(stream)`, at most `timeout` seconds; then GetTimeoutError, and nothing is lost."""
        engines.warn_if_on_a_loop("iterating over a SyncHandle's stream", "`async for` with a DeploymentHandle's")
        cell = self._cell
        while not self._has_ended:
            if (stored := cell.take()) is not None:
                part = cell.large_part(stored)
                return cell.open(stored, None if part is None else engines.background().run(cell.read_large(part)))  # type: ignore[no-any-return]
            if cell.is_over:
                if cell.has_failed or cell.missing() > 0:
                    engines.background().run(cell.read_rest())
                    if cell.has_items:
                        continue
                self._end()
            else:
                self._news(timeout)
        raise StopIteration

    def close(self) -> None:
        """Read no further: a request that still runs is cancelled."""
        self._has_ended = True
        self._cell.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def result(self, timeout: float | None = None) -> Any:
        """Ray's answer to what has no single result."""
        raise TypeError("a stream has no single result: iterate over it, or call without stream=True")

    def _end(self) -> None:
        self._has_ended = True
        self._cell.close()
        _raise_if_short(self._cell)

    def _news(self, timeout: float | None) -> None:
        news = threading.Event()
        self._cell.wait_for_news(news.set)
        try:
            if not (self._cell.has_items or self._cell.is_over) and not news.wait(timeout):
                raise GetTimeoutError(
                    f"stream {self._cell.ref_id} had no further item within {timeout} s; it goes on: ask again",
                    ref_id=self._cell.ref_id,
                )
        finally:
            self._cell.wait_for_news(None)


def _raise_if_short(cell: StreamCell) -> None:
    """Raise the request's error; or say that items which it has produced have expired."""
    if cell.missing() > 0:
        raise RefNotFoundError(
            f"stream {cell.ref_id} has ended, and {cell.missing()} of its items have expired; call again",
            ref_id=cell.ref_id,
        )

"""What an engine knows of one stream: items that have come and are not read yet, what is missing, and how it ended.

Messages are hints: what a lost one leaves out, and what was too large for one, is read from the record.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.codec import Verified
from millstream.errors import BrokerUnavailableError, RefNotFoundError
from millstream.handles.engine import Engine
from millstream.handles.route import Route

MOST_HEADER_BYTES = 20  # "item " and a number
ROWS_AT_ONCE = 100  # of the record: with the largest items that lie there, that is 6 MB


class StreamCell:
    """Filled by the engine on its loop; read from any thread, by one reader at a time."""

    is_private = False  # what it leaves in the server, `close` deletes

    def __init__(self, route: Route, ref: bytes, engine: Engine, max_ahead: int) -> None:
        self.codec, self.ref, self.engine, self._route = route.codec, ref, engine, route
        self.since = time.monotonic()
        self._tell_every = max(1, max_ahead // 2)
        self._lock = threading.Lock()
        self._items: dict[int, bytes] = {}  # number -> message
        self._next = 0  # number of the item to be read next
        self._have = 0  # of the first one from there on that is not here
        self._known = 0  # so many there are, as far as we have heard
        self._told = 0  # so many were read, as far as the replica has heard
        self._large_read: list[str] = []  # parts of large items among those that it has not heard of
        self._stored: bytes | None = None  # how it ended
        self._error: BaseException | None = None
        self._is_complete = False  # it has ended, and no item is missing any more
        self._is_looking = False
        self._on_news: Callable[[], None] | None = None
        self.is_closed = False
        self.is_shared = False  # somebody may ask how it ended

    @property
    def ref_id(self) -> str:
        return f"{self.codec.tag}~{self.ref.decode()}"

    @property
    def is_over(self) -> bool:
        return self._stored is not None or self._error is not None

    @property
    def is_complete(self) -> bool:
        """There is nothing more to come than what is here. `raise_error` says how it ended."""
        return self._is_complete

    # filled by the engine

    def item(self, stored: bytes) -> None:
        self._add(stored)
        if self._have < self._known:
            self._look()  # a message was lost, or the item was too large for one
        self._tell()

    def settle(self, stored: bytes, large: Verified | None = None) -> None:
        self._stored = stored
        try:
            self._known = max(self._known, outcomes.open_stored(self.codec, self.ref, stored))
        except BaseException as e:
            self._error = e
        if self.is_closed:
            self._forget()
        elif self._have < self._known or self._error is not None:
            self._look()  # how many there are before an error, only the record says
        else:
            self._complete()

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._complete()

    def match(self) -> None:
        """Nobody waits for it."""

    def look_again(self) -> bool:
        """It still runs, after a while, or after a reconnect: have we missed something, has the replica?"""
        if self.is_closed:
            self.engine.endings.cancel_soon([self.ref_id])
        elif self._have == self._next:
            self._look()
            self._consumed()
        return False

    def _add(self, stored: bytes) -> None:
        header, _, body = stored.partition(b"\n")
        if not header[5:].isdigit() or len(header) > MOST_HEADER_BYTES:
            return  # some other program sent it
        number = int(header[5:])
        with self._lock:
            if number >= self._next:
                self._known = max(self._known, number + 1)
                if body:
                    self._items[number] = stored
            while self._have in self._items:
                self._have += 1

    def _look(self) -> None:
        if not self._is_looking and not self.is_closed:
            self._is_looking = True
            self.engine.chores.start(self._look_at_record())

    async def _look_at_record(self) -> None:
        try:
            while not self.is_closed:
                was_over = self.is_over
                try:
                    is_all = await self._read_rows(self._have)
                except BrokerUnavailableError:
                    await self.engine.lines.link()  # for a while
                    continue
                if not is_all or self._have < self._known:
                    continue
                if was_over or (self.is_over and self._error is None):
                    return self._complete()
                if not self.is_over:
                    return None
        except Exception as e:
            if self.is_over or not isinstance(e, BrokerUnavailableError):  # else the reconnect looks again
                self._give_up(e)
        finally:
            self._is_looking = False

    async def _read_rows(self, first: int) -> bool:
        """Add the items from number `first` on that are stored, some at a time. True if there are no more."""
        commands, known = await self.engine.lines.link(), self._known
        key, start = self._route.keys.items(self.ref.decode()), f"{first + 1}-0"
        rows = await commands.ask("XRANGE", key, start, "+", "COUNT", ROWS_AT_ONCE)
        numbers = [int(entry.partition(b"-")[0]) - 1 for entry, _ in rows]
        if (numbers[0] if numbers else known) > first:
            if self._error is None:
                raise _gone(self.ref_id, first)
            self._known = self._have  # that there was an error is worth more
            return True
        for number, (_, fields) in zip(numbers, rows, strict=True):
            self._add(b"item %d\n%b\n" % (number, fields[1]))
        self._tell()
        return len(rows) < ROWS_AT_ONCE

    def _give_up(self, error: Exception) -> None:
        if not self.is_over:
            self.engine.endings.cancel_soon([self.ref_id])
        self._error = error
        self._complete()

    def _complete(self) -> None:
        self._is_complete = True
        if self.is_closed:
            self._forget()
        self._tell()

    def _tell(self) -> None:
        if (news := self._on_news) is not None:
            news()

    # read by whoever iterates

    def peek(self) -> bytes | None:
        """The next item, as the message that brought it; None if it has not come yet."""
        return self._items.get(self._next)

    def advance(self, stored: bytes) -> None:
        """That was read."""
        with self._lock:
            del self._items[self._next]
            self._next += 1
            if is_elsewhere(stored) and (part := outcomes.large_part(stored)) is not None:
                self._large_read.append(part)
        if self._next - self._told >= self._tell_every and not self.is_over:
            self._told = self._next
            self.call_there(self._consumed)

    def open(self, stored: bytes) -> Any:
        """The value of an item. Raises SignatureError."""
        header, _, rest = stored.partition(b"\n")
        return self.codec.open("item", self.ref, rest[:-1], header[5:])

    async def read_large(self, stored: bytes) -> Verified:
        """The value of an item that lies elsewhere; on the engine's loop. Raises RefNotFoundError, BrokerUnavailableError."""
        number = stored[5 : stored.index(b"\n")]
        large = await self.engine.large.read(self._route, "item", self.ref, stored, number)
        if large is None:
            raise outcomes.not_found(self.ref_id, f"item {number.decode()} of its stream has expired")
        return large

    def raise_error(self) -> None:
        """After the last item: raise the request's error, if it has one."""
        if self._error is None:
            return
        error = outcomes.same_kind(self._error)
        if isinstance(error, StopIteration | StopAsyncIteration):  # which would mean that all went well
            error = RuntimeError(f"the method raised {type(error).__name__}")
        raise error

    def wait_for_news(self, news: Callable[[], None] | None) -> None:
        """Have `news` called when there may be something to read."""
        self._on_news = news

    # its end

    def close(self) -> None:
        """Nobody reads on: cancel what still runs, delete what is stored. Any thread; twice is as once."""
        if self.is_closed:
            return
        self.is_closed = True
        self._tell()
        if not self.engine.is_closed:
            self.call_there(self._close_there)

    def _close_there(self) -> None:
        if self.is_over:
            self._forget()
        else:
            self.engine.endings.cancel_soon([self.ref_id])  # `settle` follows

    def _consumed(self) -> None:
        """Tell the replica how many items have been read; what was stored of them goes."""
        commands = self.engine.lines.commands
        if commands is None or self._next == 0:
            return
        with self._lock:
            parts, self._large_read = self._large_read, []

        def answered(reply: int | Exception) -> None:
            if isinstance(reply, Exception):
                self._large_read += parts  # for another time

        commands.start(scripts.consume(self._route.keys, self.ref.decode(), self._next, parts), answered)

    def _forget(self) -> None:
        """Delete what the server holds of a request that has ended, as far as we know of it."""
        keys, ref, commands = self._route.keys, self.ref.decode(), self.engine.lines.commands
        with self._lock:
            unread, self._items = list(self._items.values()), {}
        parts = [*self._large_read, *filter(None, map(outcomes.large_part, unread))]
        if commands is not None:
            commands.send(_ignore, "UNLINK", keys.items(ref), *(keys.value(ref, part) for part in parts))
        if self._stored is not None and not self.is_shared:
            self.engine.drops.add(self.codec.tag, self.ref, self._stored, self.since)

    def call_there(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have a function called on the engine's loop, soon."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: nothing more can be sent
            self.engine.loop.call_soon_threadsafe(function, *arguments)


def is_elsewhere(stored: bytes) -> bool:
    """Does the value of this item lie in a key of its own? A pickle ends with a dot, JSON with a bracket or the like."""
    return stored[-2:] == b"\n\n"


def _gone(ref_id: str, number: int) -> RefNotFoundError:
    return RefNotFoundError(
        f"item {number} of stream {ref_id} is gone from the server: it expired, was evicted, or lost in a restart; "
        "call again",
        ref_id=ref_id,
    )


def _ignore(reply: object) -> None:
    """A hint, or something with a TTL: nothing depends on it."""

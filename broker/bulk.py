"""Large values, in keys of their own, over connections of their own: in pieces, so that they hold up nobody else.

One SET of 100 MB stops a server with an append-only file for half a second, and a GET of them an older one for a quarter; in
pieces of this size neither stops it for more than a few milliseconds. What arrives is written where it stays: nothing is
joined or copied.
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import hiredis

from millstream.broker.cluster import dial
from millstream.broker.connection import backoff
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import explain
from millstream.broker.memory import allocate
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError

T = TypeVar("T")
pack: Callable[[tuple[Any, ...]], bytes] = hiredis.pack_command
PIECE_BYTES = 512 * 1024
UNDER_WAY = 4  # pieces that are not acknowledged, or asked for and not here
MOST_CONNECTIONS = 4  # values on their way at once, of one client or replica
UNFINISHED_TTL_MS = 60_000  # of what has come of a value, since its last piece but UNFINISHED_PIECES
UNFINISHED_PIECES = 32
MOST_CUTS = 10  # connections lost under one value; more are no accident
IN_A_THREAD_BYTES = 256 * 1024  # to sign more than that (about 0.3 ms) would hold up the loop
FEED_BYTES = 2 * 1024 * 1024  # at a time, to be verified

Part = bytes | memoryview
T_co = TypeVar("T_co", covariant=True)


class Envelope(Protocol):
    """What is written: `sign` gives what stands before the parts, and takes long where they are large."""

    @property
    def parts(self) -> Sequence[Part]: ...
    @property
    def size_bytes(self) -> int: ...
    def sign(self) -> bytes: ...


class Opening(Protocol[T_co]):
    """What is done with a value that comes: `update` takes long, and is called in threads, one after the other."""

    def update(self, data: memoryview) -> None: ...
    def verified(self, value: memoryview) -> T_co: ...


class Bulk:
    """Writes and reads large values; belongs to one loop. Each value has a connection for itself while it is on its way.

    A connection that is lost is replaced, and the value sent or read again, for `patience_s` (None: for ever). After that,
    and after `close`, BrokerUnavailableError. A transfer that is cancelled gives its connection up.
    """

    def __init__(self, settings: Settings, name: str, *, patience_s: float | None) -> None:
        self._settings, self._name, self._patience_s = settings, name, patience_s
        self._idle: list[_Wire] = []
        self._busy: set[_Wire] = set()
        self._room = asyncio.Semaphore(MOST_CONNECTIONS)
        self._is_closed = False

    async def write(
        self, keys: DeploymentKeys, key: str, envelope: Envelope, ttl_ms: int, *, only_new: bool = False
    ) -> bool:
        """Store an envelope as the value of one of these `keys`; its parts must not change meanwhile. A large one is signed
        while it is on its way.

        The key appears when all of it is there. With `only_new`, what it holds already stays, and the answer is False.
        Raises BackPressureError where the server is full.
        """

        async def transfer(wire: _Wire) -> bool:
            return await _write(wire, keys.arriving(os.urandom(8).hex()), key, envelope, ttl_ms, only_new)

        return await self._persistently(key, transfer)

    async def read(self, key: str, size_bytes: int, begin: Callable[[], Opening[T]]) -> T | None:
        """What an opening makes of a value of that size, in memory of its own that may be written to; None if it is gone.

        A large one is verified while it comes. Raises what the opening does: SignatureError.
        """

        async def transfer(wire: _Wire) -> T | None:
            opening, value = begin(), allocate(size_bytes)
            following = _Following(opening.update, value)
            if not await _read(wire, key, value, following.arrived):
                return None
            await following.finish()
            return opening.verified(value)

        return await self._persistently(key, transfer)

    def close(self) -> None:
        self._is_closed = True
        for wire in (*self._idle, *self._busy):
            wire.close()

    async def _persistently(self, key: str, transfer: Callable[["_Wire"], Awaitable[T]]) -> T:
        delays, cuts = backoff(), 0
        give_up = math.inf
        while True:
            try:
                async with self._wire(key) as wire:
                    return await transfer(wire)
            except BrokerUnavailableError as e:
                cuts += isinstance(e, _CutError)
                if self._patience_s is not None:
                    give_up = min(give_up, time.monotonic() + self._patience_s)
                if self._is_closed or cuts >= MOST_CUTS or time.monotonic() > give_up:
                    raise
            await asyncio.sleep(next(delays))

    @asynccontextmanager
    async def _wire(self, key: str) -> AsyncIterator["_Wire"]:
        """A connection to oneself. It is used again if all went well."""
        async with self._room:
            wire = await self._connected(key)
            self._busy.add(wire)
            try:
                yield wire
            except BaseException:
                wire.close()
                raise
            finally:
                self._busy.discard(wire)
                if wire.is_up and not self._is_closed:
                    self._keep(wire)

    def _keep(self, wire: "_Wire") -> None:
        self._idle.append(wire)
        if len(self._idle) > MOST_CONNECTIONS:  # in a cluster, each serves one deployment
            self._idle.pop(0).close()

    async def _connected(self, key: str) -> "_Wire":
        near = key[: key.find("}") + 1] if self._settings.is_cluster else ""
        for wire in [wire for wire in reversed(self._idle) if wire.near == near]:
            self._idle.remove(wire)
            if wire.is_up:
                return wire
        if self._is_closed:
            raise BrokerUnavailableError("this connection was closed; call again to open a new one")
        link = await dial(self._settings, f"ms:bulk:{self._name}", near=key)
        wire = _Wire(near)
        wire.transport = link.hand_over(wire)
        return wire


class _CutError(BrokerUnavailableError):
    """A connection was lost with a value on its way."""


class _Wire(asyncio.BufferedProtocol):
    """One connection: what comes is read into the place where it is wanted."""

    def __init__(self, near: str) -> None:
        self.near = near  # in a cluster: the hash tag whose node is at the other end
        self.transport: asyncio.Transport
        # For what comes while nobody wants it anywhere. A view: what asyncio reads by TLS into a slice of a bytearray is lost.
        self._scratch = memoryview(bytearray(4096))
        self._read = bytearray()  # from there, and not used yet
        self._target: memoryview | None = None
        self._news: asyncio.Future[None] | None = None
        self._is_paused = self._is_lost = False

    @property
    def is_up(self) -> bool:
        return not self._is_lost

    def close(self) -> None:
        if not self._is_lost:
            self.transport.abort()
            self.connection_lost(None)

    # asyncio.BufferedProtocol

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._scratch if self._target is None else self._target

    def buffer_updated(self, nbytes: int) -> None:
        if self._target is None:
            self._read += self._scratch[:nbytes]
        else:
            self._target = self._target[nbytes:]
            if self._target:
                return
            self._target = None
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._tell()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._tell()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _until_news(self) -> None:
        if self._is_lost:
            raise _CutError("the connection to the server was lost with a large value on its way")
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    # one thing at a time

    async def send(self, *pieces: Part) -> None:
        """Write, and return when there is room for more."""
        for piece in pieces:
            self.transport.write(piece)
        while self._is_paused or self._is_lost:
            await self._until_news()

    async def line(self) -> bytes:
        """The next line of a reply. Raises what an error reply stands for."""
        while (end := self._read.find(b"\r\n")) < 0:
            await self._until_news()
        line = bytes(self._read[:end])
        del self._read[: end + 2]
        if line[:1] == b"-":
            raise explain(hiredis.ReplyError(line[1:].decode(errors="replace")))
        return line

    async def fill(self, target: memoryview) -> None:
        """Read exactly so much."""
        have = min(len(self._read), len(target))
        target[:have] = self._read[:have]
        del self._read[:have]
        if have < len(target):
            self._target = target[have:]
            try:
                while self._target is not None:
                    await self._until_news()
            finally:
                self._target = None


async def _write(wire: _Wire, unfinished: str, key: str, envelope: Envelope, ttl_ms: int, only_new: bool) -> bool:
    parts, signing = envelope.parts, None
    if envelope.size_bytes <= IN_A_THREAD_BYTES:
        parts = [envelope.sign(), *parts]
    else:
        signing = asyncio.get_running_loop().run_in_executor(_threads(), envelope.sign)
    name = unfinished.encode()
    expected: deque[bytes] = deque()

    async def hear(at_most: int) -> None:
        while len(expected) > at_most:
            line, wanted = await wire.line(), expected.popleft()
            if wanted and line != wanted:  # it has expired meanwhile
                raise _CutError(f"what had arrived of a large value is gone (the server said {line!r})")

    def expire(ttl_ms: int) -> bytes:
        expected.append(b":1")
        return pack(("PEXPIRE", name, ttl_ms))

    number = -1
    for number, piece in enumerate(_cut(parts)):
        size = sum(map(len, piece))
        if number == 0:  # all or nothing: never without a TTL
            await wire.send(pack(("MULTI",)), b"*3\r\n$5\r\nRPUSH\r\n")
            expected += (b"+OK", b"+QUEUED", b"+QUEUED", b"*2", b":1")
        else:
            await wire.send(b"*3\r\n$6\r\nRPUSHX\r\n")
            expected.append(b":%d" % (number + 1))
        await wire.send(b"$%d\r\n%b\r\n$%d\r\n" % (len(name), name, size), *piece, b"\r\n")
        if number == 0:
            await wire.send(expire(UNFINISHED_TTL_MS), pack(("EXEC",)))
        elif number % UNFINISHED_PIECES == 0:
            await wire.send(expire(UNFINISHED_TTL_MS))
        await hear(UNDER_WAY)
    if signing is not None and (head := await signing):
        await wire.send(pack(("LPUSHX", name, head)))
        expected.append(b":%d" % (number + 2))
    await wire.send(expire(ttl_ms), pack(("RENAMENX" if only_new else "RENAME", name, key)))
    await hear(0)
    if await wire.line() == b":0":
        await wire.send(pack(("UNLINK", name)))
        await wire.line()
        return False
    return True


async def _read(wire: _Wire, key: str, value: memoryview, arrived: Callable[[int], None]) -> bool:
    """Fill `value`; False if it is not so long. `arrived` hears how much of it has come."""
    size_bytes = len(value)
    asked = came = position = 0
    while position < size_bytes:
        while asked - came < UNDER_WAY and (asked == came or position + (asked - came) * PIECE_BYTES < size_bytes):
            await wire.send(pack(("LINDEX", key, asked)))
            asked += 1
        length = int((await wire.line())[1:])
        if not 0 < length <= size_bytes - position:  # -1: there is no such piece
            wire.close()  # with it, what we have asked for beyond this
            return False
        await wire.fill(value[position : position + length])
        await wire.line()
        came, position = came + 1, position + length
        arrived(position)
    return True


def _cut(parts: Sequence[Part]) -> Iterator[list[memoryview]]:
    """Pieces of PIECE_BYTES, the last one shorter, each as slices of the parts."""
    piece: list[memoryview] = []
    room = PIECE_BYTES
    for part in parts:
        view = memoryview(part)
        while view:
            piece.append(view[:room])
            view, room = view[room:], room - min(room, len(view))
            if not room:
                yield piece
                piece, room = [], PIECE_BYTES
    if piece:
        yield piece


# what takes long


class _Following:
    """Feeds a function with what has come of a value, in order: in a thread, while the rest is coming.

    In threads of ours: the loop's own the user's code may have filled with calls that wait for us.
    """

    def __init__(self, update: Callable[[memoryview], None], value: memoryview) -> None:
        self._update, self._value = update, value
        self._loop = asyncio.get_running_loop()
        self._arrived = self._fed = 0
        self._feeding: asyncio.Future[None] | None = None

    def arrived(self, upto: int) -> None:
        self._arrived = upto
        if self._feeding is None and upto - self._fed >= FEED_BYTES:
            self._feeding = self._loop.run_in_executor(_threads(), self._update, self._next())
            self._feeding.add_done_callback(self._go_on)

    def _next(self) -> memoryview:
        fed, self._fed = self._fed, self._arrived
        return self._value[fed : self._fed]

    def _go_on(self, feeding: asyncio.Future[None]) -> None:
        if not feeding.cancelled() and feeding.exception() is None and self._feeding is feeding:
            self._feeding = None
            self.arrived(self._arrived)

    async def finish(self) -> None:
        """Return when the function has had all. Raises what it has raised."""
        while (feeding := self._feeding) is not None:
            await asyncio.shield(feeding)
            if self._feeding is feeding:  # it was done before, so that nobody else has had a turn
                self._feeding = None
        rest = self._next()
        if len(rest) > IN_A_THREAD_BYTES:
            await self._loop.run_in_executor(_threads(), self._update, rest)
        else:
            self._update(rest)


_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(2, thread_name_prefix="millstream-signing")
    return _pool


def _forget_threads() -> None:
    """They stay with the parent of a fork."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_threads)

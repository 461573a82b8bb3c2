"""The producing half of a stream: sends items, and makes their producer wait where the reader is too far behind.

Items that were sent and not acknowledged are sent again after a reconnect; the script keeps what is there already.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from millstream.broker import pickling, scripts
from millstream.broker.call import Call, script
from millstream.broker.codec import Codec
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import Link
from millstream.broker.pickling import Pickled
from millstream.errors import BrokerUnavailableError, MillstreamError, SerializationError
from millstream.replicas.large import LargeValues

READER_GONE_S = 30.0  # a reader that is not connected for so long, with items to read, does not come back
READER_GONE = "its reader was not connected for 30 s"
AT_ONCE = 100  # items in one call of the script, of at most
BYTES_AT_ONCE = 256 * 1024  # and so much, or of one
RETRY_S = 0.05
Place = tuple[str, bytes]
log = logging.getLogger("millstream.replica")


class Emitters:
    """All streams of this replica. `resume` before the finisher does: a result may not overtake its items.

    `cancel(ref, why)` ends a request on the server.
    """

    def __init__(
        self,
        keys: DeploymentKeys,
        codec: Codec,
        large: LargeValues,
        ttl_s: int,
        cancel: Callable[[bytes, str], Awaitable[None]],
    ) -> None:
        self.keys, self.codec, self.large, self.ttl_s, self._cancel = keys, codec, large, ttl_s, cancel
        self.link: Link | None = None
        self._emitters: dict[Place, Emitter] = {}
        self._alone_since: dict[bytes, float] = {}  # clients that do not listen, and since when
        self._may_ask = True  # who listens; an ACL may forbid it

    def open(
        self,
        place: Place,
        ref: bytes,
        client: bytes,
        max_ahead: int,
        on_stale: Callable[[], Any],
        *,
        is_json: bool = False,
    ) -> "Emitter":
        """`on_stale()` is called if the server says that the request does not run here any more."""
        emitter = self._emitters[place] = Emitter(self, place, ref, client, max_ahead, on_stale, is_json=is_json)
        return emitter

    def resume(self, link: Link) -> None:
        """There is a connection (again): send what is not acknowledged."""
        self.link = link
        # A script that the server does not know is sent once more, later than what follows it: no item may be late.
        link.send(_ignore, "SCRIPT", "LOAD", script("emit").source)
        for emitter in list(self._emitters.values()):
            emitter.send_again()

    def was_read(self, place: Place, count: int) -> None:
        """The reader of a stream has read so many of its items."""
        if (emitter := self._emitters.get(place)) is not None:
            emitter.was_read(count)

    def close(self, place: Place) -> None:
        """Nobody wants the rest: whoever produces it is stopped."""
        if (emitter := self._emitters.pop(place, None)) is not None:
            emitter.close()

    def forget(self, place: Place) -> None:
        self._emitters.pop(place, None)

    async def look(self) -> None:
        """One look at the readers, about once a second: how far they are, where no order told us; and whether they live.

        Raises BrokerUnavailableError.
        """
        link = self.link
        waiting = [emitter for emitter in self._emitters.values() if emitter.has_unread]
        if link is None or not waiting:
            self._alone_since.clear()
            return
        await asyncio.gather(*[emitter.ask(link) for emitter in waiting])
        gone = await self._gone(link, list({emitter.client for emitter in waiting}))
        for emitter in [emitter for emitter in waiting if emitter.client in gone]:
            log.warning("nobody reads stream %s~%s any more: it is cancelled", self.keys.tag, emitter.ref.decode())
            await self._cancel(emitter.ref, READER_GONE)
            emitter.delete_items(link)

    async def _gone(self, link: Link, clients: list[bytes]) -> set[bytes]:
        """Those who have not listened for a while."""
        if not self._may_ask:
            return set()
        try:
            answer = await link.ask("PUBSUB", "SHARDNUMSUB", *(self.keys.reply(client.decode()) for client in clients))
        except BrokerUnavailableError:
            raise
        except Exception as e:
            self._may_ask = False
            log.warning(
                "streams of readers that are gone will go on, because this server does not say who listens: %s", e
            )
            return set()
        now, since = asyncio.get_running_loop().time(), self._alone_since
        # Who has no channel asks by itself, and is never known to be gone.
        self._alone_since = {c: since.get(c, now) for c, n in zip(clients, answer[1::2], strict=True) if c and not n}
        return {client for client, alone in self._alone_since.items() if now - alone > READER_GONE_S}


class Emitter:
    """One stream."""

    def __init__(
        self,
        all_: Emitters,
        place: Place,
        ref: bytes,
        client: bytes,
        max_ahead: int,
        on_stale: Callable[[], Any],
        *,
        is_json: bool,
    ) -> None:
        self._all, self._place, self.ref, self.client = all_, place, ref, client
        self._max_ahead, self._on_stale, self._is_json = max_ahead, on_stale, is_json
        self._loop = asyncio.get_running_loop()
        self._what = f"of a stream of {all_.codec.tag}"
        self._there = 0  # so many items are there from an attempt before this one: they are not made again
        self._unacknowledged: list[bytes] = []  # envelopes, the first of them item `_acknowledged`
        self._acknowledged = self._sent = self._sent_ever = self._count = self._read = 0
        self._large: dict[int, str] = {}  # parts of large items that are not read yet
        self._in_the_air = 0
        self._is_scheduled = self._has_ended = self._is_closed = self._was_cut_off = False
        self._failure: MillstreamError | None = None  # why the server takes no items
        self._news = asyncio.Event()

    @property
    def count(self) -> int:
        """So many items have been made."""
        return self._count

    @property
    def has_unread(self) -> bool:
        return self._read < self._count

    # producing

    async def go_on(self) -> None:
        """The attempt before this one may have made items: they stay, and their reader may have read some."""
        while (link := self._all.link) is not None and not self._is_closed:
            try:
                info = await link.ask("XINFO", "STREAM", self._all.keys.items(self.ref.decode()))
                named = dict(zip(info[::2], info[1::2], strict=True))
                self._there = self._acknowledged = self._sent = int(named[b"last-generated-id"].partition(b"-")[0])
                await self.ask(link)
                return
            except BrokerUnavailableError:
                await asyncio.sleep(RETRY_S)  # a reconnect brings another link
            except Exception:
                return  # there is no such key

    @property
    def is_full(self) -> bool:
        return self._count - self._read >= self._max_ahead

    def seal(self, item: Any) -> bytes | Pickled:
        """The envelope of the next item; of a large one, a copy of what it will be made of. Empty: it is there already."""
        if self._count < self._there:
            return b""
        codec, number, what = self._all.codec, b"%d" % self._count, f"item {self._count} {self._what}"
        if self._is_json:
            return _seal_json(codec, self.ref, item, number, what)
        body = pickling.dump_parts(item, what)
        return body.snapshot() if isinstance(body, Pickled) else codec.seal("item", self.ref, body, number)

    async def write(self, pickled: Pickled) -> bytes:
        """Store the next item, a large one, under a key of its own; its envelope."""
        number = self._count
        part = self._large[number] = f"{number}.{self._place[1].decode()}"
        return await self._all.large.write_item(self.ref, part, pickled, b"%d" % number)

    def add(self, envelope: bytes, soon: Callable[[Callable[[], None]], Any]) -> None:
        """The next item; it goes out `soon`. Raises CancelledError if nobody wants it, MillstreamError if it was refused."""
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise asyncio.CancelledError
        if envelope:
            self._unacknowledged.append(envelope)
        self._count += 1
        if not self._is_scheduled:
            self._is_scheduled = True
            soon(self.flush)

    async def until_read(self) -> None:
        """Wait until the reader is less far behind. Raises as `add`."""
        while self.is_full and not self._is_closed:
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise asyncio.CancelledError

    # sending

    def flush(self) -> None:
        """Send what is not sent yet. One call is in the air at a time: the next one brings all that comes meanwhile."""
        self._is_scheduled = False
        link = self._all.link
        if link is None or not link.is_up or self._is_closed:
            return
        while self._sent < self._count and (self._has_ended or not self._in_the_air):
            batch = self._next_batch()
            first, self._sent = self._sent, self._sent + len(batch)
            self._sent_ever = max(self._sent_ever, self._sent)
            self._in_the_air += 1
            link.start(self._call(first, batch), lambda reply, upto=self._sent: self._answered(upto, reply))  # type: ignore[misc]

    def _next_batch(self) -> list[bytes]:
        start = self._sent - self._acknowledged
        batch = self._unacknowledged[start : start + AT_ONCE]
        size_bytes = 0
        for number, envelope in enumerate(batch):
            size_bytes += len(envelope)
            if size_bytes > BYTES_AT_ONCE:
                return batch[: number or 1]
        return batch

    def end(self) -> None:
        """No more items: what is not sent yet goes out now, ahead of the result."""
        self._has_ended = True
        self.flush()
        self._forget_if_done()

    def close(self) -> None:
        """Take no further items."""
        self._is_closed = True
        self._news.set()
        self._delete_values(self._sent_ever)

    def send_again(self) -> None:
        """What is not acknowledged. That it may have been taken does no harm."""
        self._was_cut_off = self._was_cut_off or self._sent > self._acknowledged
        self._sent, self._in_the_air = self._acknowledged, 0
        self.flush()

    def _call(self, first: int, batch: list[bytes]) -> Call[tuple[bool, int]]:
        lane, entry = self._place
        place = f"{lane} {entry.decode()}"
        return scripts.emit(self._all.keys, self.ref.decode(), place, self.client, self._all.ttl_s, first, batch)

    def _answered(self, upto: int, reply: tuple[bool, int] | Exception) -> None:
        self._in_the_air = max(0, self._in_the_air - 1)
        if isinstance(reply, BrokerUnavailableError):
            self._loop.call_later(RETRY_S, self.send_again)  # unless a new connection does so sooner
            return
        if isinstance(reply, Exception):
            self._fail(reply)
            return
        if not reply[0]:
            if not self._was_cut_off:  # else they may have been taken before that
                self._delete_values(self._acknowledged)
            self._on_stale()
            return
        if upto > self._acknowledged:
            del self._unacknowledged[: upto - self._acknowledged]
            self._acknowledged = upto
        self.flush()
        self._forget_if_done()

    def _fail(self, reply: Exception) -> None:
        if self._failure is None:
            log.error("the server takes no items of stream %s~%s: %s", self._all.keys.tag, self.ref.decode(), reply)
            self._failure = MillstreamError(f"the server did not take an item of this stream ({reply}); call again")
        self._is_closed = True
        self._news.set()
        self._forget_if_done()

    def _forget_if_done(self) -> None:
        if self._has_ended and (self._acknowledged >= self._count or self._is_closed):
            self._all.forget(self._place)

    # the reader

    def was_read(self, count: int) -> None:
        if count > self._read:
            self._read = count
            if self._large:
                self._large = {number: part for number, part in self._large.items() if number >= count}
            self._news.set()

    async def ask(self, link: Link) -> None:
        """How far is it? Asking also keeps what it has not read. Raises BrokerUnavailableError."""
        try:
            if self._large:
                keys, ref = self._all.keys, self.ref.decode()
                parts = [keys.value(ref, part) for part in self._large.values()]
                await link.run(scripts.keep(parts, max(60, self._all.ttl_s) * 1000))
            is_running, read = await link.run(self._call(self._count, []))
        except BrokerUnavailableError:
            raise
        except Exception as e:
            self._fail(e)
            return
        if is_running:
            self.was_read(read)
        else:
            self.close()
            self._on_stale()

    def delete_items(self, link: Link) -> None:
        """Nobody will read them."""
        link.send(_ignore, "UNLINK", self._all.keys.items(self.ref.decode()))
        self._delete_values(0)

    def _delete_values(self, first: int) -> None:
        """Of large items of this very attempt, from number `first` on."""
        link, keys, ref = self._all.link, self._all.keys, self.ref.decode()
        numbers = [number for number in self._large if number >= first]
        if numbers and link is not None and link.is_up:
            link.send(_ignore, "UNLINK", *(keys.value(ref, self._large.pop(number)) for number in numbers))


def _seal_json(codec: Codec, ref: bytes, item: Any, number: bytes, what: str) -> bytes:
    try:
        return codec.seal_json("item", ref, item, number)
    except (TypeError, ValueError) as e:
        raise SerializationError(f"{what} cannot be written as JSON, as its caller wants it: {e}") from None


def _ignore(reply: object) -> None:
    """What could not be deleted has a TTL; a script that could not be loaded is sent with its call."""

"""Sends outcomes in batches: everything that ended in one pass of the loop goes out in one script call per lane.

Holds each outcome until the server has acknowledged it; after a lost connection it is sent again, which the script
recognises.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from millstream.broker import scripts
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import Link
from millstream.broker.scripts import Finished, Waiter
from millstream.broker.supplying import Supplier
from millstream.errors import BrokerUnavailableError

FIELDS = 5  # of one outcome in a finish call
AT_ONCE = 100  # outcomes per call: the server does nothing else meanwhile
BYTES_AT_ONCE = 1024 * 1024  # one larger result goes alone; the server cuts off who sends it more than 1 GB in one call
RETRY_S = 1.0  # when the server refuses, but answers
log = logging.getLogger("millstream.replica")


class Finisher:
    """Collects outcomes and matched notices, and flushes them once per pass of the loop."""

    def __init__(
        self,
        keys: DeploymentKeys,
        ttl_s: int,
        supplier: Supplier,
        start_chore: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._keys, self.ttl_s = keys, ttl_s
        self._supplier, self._start_chore = supplier, start_chore
        self._loop = asyncio.get_running_loop()
        self._outcomes: dict[str, list[Any]] = {}  # lane -> flat outcomes
        self._notices: dict[bytes, tuple[bytes, bytes]] = {}  # ref -> client, place
        self._in_the_air = 0
        self._is_scheduled = False
        self._refusal = ""  # what the server said last, if it was no
        self.link: Link | None = None
        self.on_lost_value: Callable[[str, bytes, bytes, bytes], None] | None = None  # lane, entry, ref, client

    @property
    def is_idle(self) -> bool:
        """Is everything acknowledged?"""
        return not self._in_the_air and not any(self._outcomes.values())

    def holds(self, lane: str, entry: bytes) -> bool:
        """Does an outcome of this entry wait to be sent (again)?"""
        return entry in self._outcomes.get(lane, ())[::FIELDS]

    def finish(self, lane: str, entry: bytes, ref: bytes, client: bytes, state: bytes, envelope: bytes) -> None:
        outcomes = self._outcomes.get(lane)
        if outcomes is None:
            outcomes = self._outcomes[lane] = []
        outcomes += (entry, ref, client, state, envelope)
        if self._notices:
            self._notices.pop(ref, None)  # the result says it
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)

    def notice(self, ref: bytes, client: bytes, place: bytes) -> None:
        """Tell the caller that its request is running, unless it has ended by the next flush."""
        self._notices[ref] = (client, place)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)

    def expect_flush(self) -> None:
        """Whoever calls this will call `flush`, in this pass of the loop: none need be scheduled for what ends until then."""
        self._is_scheduled = True

    def flush(self, over: Link) -> None:
        """Send what is to be sent, at once, over a connection on which something else is sent next."""
        if self._is_scheduled:
            self._flush(over)

    def resume(self, link: Link) -> None:
        """There is a connection (again): send what is waiting."""
        self.link = link
        self._flush()

    def forget_value(self, ref: bytes, entry: bytes) -> None:
        """What this attempt has written under a key of its own is nobody's."""
        if self.link is not None:
            self.link.send(_ignore, "UNLINK", self._keys.value(ref.decode(errors="replace"), entry.decode()))

    def _flush(self, over: Link | None = None) -> None:
        self._is_scheduled = False
        link = over or self.link
        if link is None or not link.is_up:
            return
        for lane, outcomes in self._outcomes.items():
            for batch in _batches(outcomes):
                self._send(link, lane, batch)
        self._outcomes.clear()
        if self._notices:
            self._send_notices(link)

    def _send(self, link: Link, lane: str, batch: list[Any]) -> None:
        self._in_the_air += 1
        link.start(
            scripts.finish(self._keys, lane, self.ttl_s, batch), lambda reply: self._finished(lane, batch, reply)
        )

    def _finished(
        self, lane: str, batch: list[Any], reply: tuple[dict[int, Finished], list[Waiter]] | Exception
    ) -> None:
        self._in_the_air -= 1
        if isinstance(reply, Exception):
            self._outcomes[lane] = batch + self._outcomes.get(lane, [])
            if not isinstance(reply, BrokerUnavailableError) and str(reply) != self._refusal:
                self._refusal = str(reply)  # said once, though it is tried again and again
                log.error("finish was refused by the server and will be tried again: %s", reply)
            self._loop.call_later(RETRY_S, self._flush)  # unless a new connection sends it sooner
            return
        self._refusal = ""
        refused, waiters = reply
        for position, why in refused.items():
            entry, ref, client = batch[position * FIELDS : position * FIELDS + 3]
            if why is Finished.STALE:
                log.warning(
                    "request %s~%s was taken over while it ran here: its late result is dropped",
                    self._keys.tag,
                    ref.decode(errors="replace"),
                )
            elif why is Finished.MISSING and self.on_lost_value is not None:
                self.on_lost_value(lane, entry, ref, client)
            if why is not Finished.DONE and batch[position * FIELDS + 4][:1] == b"@":
                self.forget_value(ref, entry)
        if waiters:
            self._start_chore(self._supply(lane, batch, waiters))

    async def _supply(self, lane: str, batch: list[Any], waiters: list[Waiter]) -> None:
        stored, wanted = {}, {waiter.ref for waiter in waiters}
        for i in range(0, len(batch), FIELDS):
            entry, ref, _, state, envelope = batch[i : i + FIELDS]
            if ref in wanted:
                stored[ref] = b"%b %b %b\n%b" % (state, lane.encode(), entry, envelope)
        with contextlib.suppress(BrokerUnavailableError):  # any sweeper finds the rest
            await self._supplier.supply_all(self._keys.tag, waiters, stored)

    def _send_notices(self, link: Link) -> None:
        by_client: dict[bytes, list[bytes]] = {}
        for ref, (client, place) in self._notices.items():
            stored = b"running %b\n" % place
            by_client.setdefault(client, []).append(
                b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(ref), ref, len(stored), stored)
            )
        self._notices.clear()
        for client, items in by_client.items():
            message = b"*%d\r\n%b" % (2 * len(items), b"".join(items))
            link.send(_ignore, "SPUBLISH", self._keys.reply(client.decode(errors="replace")), message)


def _batches(outcomes: list[Any]) -> Iterator[list[Any]]:
    """Cut flat outcomes into calls of at most AT_ONCE, and about BYTES_AT_ONCE."""
    if len(outcomes) <= FIELDS * AT_ONCE and sum(map(len, outcomes[FIELDS - 1 :: FIELDS])) <= BYTES_AT_ONCE:
        yield outcomes  # nearly always; looking at each one costs 0.3 us
        return
    batch: list[Any] = []
    size_bytes = 0
    for i in range(0, len(outcomes), FIELDS):
        batch += outcomes[i : i + FIELDS]
        size_bytes += len(outcomes[i + FIELDS - 1])
        if len(batch) == FIELDS * AT_ONCE or size_bytes >= BYTES_AT_ONCE:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _ignore(reply: Any) -> None:
    """A notice is a hint: the caller finds out by itself. What could not be deleted has a TTL."""

"""Sends requests in batches: what comes while a batch is in the air goes out together with the next one.

Every request is idempotent by its ref, so a batch whose reply was lost is simply sent again.
"""

import time
from collections.abc import Iterable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.link import Link
from millstream.broker.scripts import Submitted
from millstream.errors import BackPressureError, BrokerUnavailableError, MillstreamError
from millstream.handles.hub import Hub
from millstream.handles.lines import PATIENCE_S
from millstream.handles.route import Batch, Pending, Route

FIELDS = 5  # of one request in a submit call
FLUSH_REQUESTS = 64  # a fuller script call gains nothing and delays the others
FLUSH_BYTES = 64 * 1024
OVERHEAD_BYTES = 200  # of one request in the buffer, beside its envelope
IN_THE_AIR = 3  # so many submit calls go out without waiting for an answer; then what comes waits to be sent together
MOST_IN_THE_AIR = 100  # calls; what comes then stays in the buffer, whose size is bounded
MOST_BUFFERED_BYTES = 256 * 1024 * 1024
RETRY_S = 0.05  # for a server that answers and cannot take requests now: loading, or demoted to a replica
ROOM_AFTER_S = (0.01, 0.25)  # a patient caller asks a full queue again after so long, at first and at last


class Submitter:
    """The sending half of an engine."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._lines, self._pending = hub, hub.lines, hub.pending
        self._unqueued: set[bytes] = set()  # refs of requests whose callers wait until the server has them
        self._adopted: set[bytes] = set()  # refs of requests that we send for another engine of this process
        self.sent = 0  # requests so far

    def submit(
        self,
        route: Route,
        pending: Pending,
        lane: bytes,
        method: bytes,
        extras: bytes,
        envelope: bytes,
        until_queued: bool = False,
    ) -> None:
        """Send a request; `pending` hears of its end. Twice with the same ref is as once.

        It is matched when a replica has taken it (if `extras` ask for that), and `until_queued` when the server has.
        """
        self._pending[pending.ref] = pending
        self.sent += 1
        if until_queued:
            self._unqueued.add(pending.ref)
        buffer = route.buffer
        buffer += (pending.ref, lane, method, extras, envelope)
        route.buffered_bytes += len(envelope) + OVERHEAD_BYTES
        if not route.is_ready:
            self._prepare(route)
        elif not route.in_the_air or len(buffer) >= FIELDS * FLUSH_REQUESTS or route.buffered_bytes >= FLUSH_BYTES:
            self.flush(route)
        elif route.in_the_air < IN_THE_AIR and len(buffer) == FIELDS:
            self._hub.loop.call_soon(self.flush, route)
        if route.buffered_bytes > MOST_BUFFERED_BYTES:
            self._refuse_last(route)

    def unsent(self, route: Route) -> set[bytes]:
        """Refs that the server does not know yet."""
        return {*route.buffer[::FIELDS], *route.patient[::FIELDS]} if route.buffer or route.patient else set()

    def asks_for_room(self, route: Route, ref: bytes) -> bool:
        """Was this one sent for as long as it takes, and is not known to have found room yet?"""
        batches = [batch.requests for batch in route.unacknowledged]
        for requests in (*batches, route.buffer, route.patient):
            if ref in requests[::FIELDS]:
                return b'"patient"' in requests[requests.index(ref) + 3]
        return False

    def unacknowledged(self, route: Route) -> list[Any]:
        """All requests that the server may not have, flat. Any thread."""
        return [part for batch in route.unacknowledged for part in batch.requests] + route.buffer

    def adopt(self, tag: str, requests: list[Any]) -> None:
        """Send requests of another engine of this process."""
        route = self._hub.route(tag)
        route.buffer += requests
        self._adopted.update(requests[::FIELDS])
        self._prepare(route)

    def flush(self, route: Route) -> None:
        """Put what is buffered for this deployment into the air, at most FLUSH_REQUESTS at a time."""
        commands = self._lines.commands
        if commands is None or not commands.is_up:
            return  # the reconnect flushes
        while route.buffer and route.in_the_air < MOST_IN_THE_AIR:
            batch = Batch(route.buffer[: FIELDS * FLUSH_REQUESTS])
            del route.buffer[: FIELDS * FLUSH_REQUESTS]
            route.in_the_air += 1
            route.unacknowledged.add(batch)
            commands.start(
                scripts.submit(route.keys, self._hub.name, batch.requests),
                lambda reply, batch=batch: self._acknowledged(route, batch, reply),  # type: ignore[misc]
            )
        route.buffered_bytes = 0 if not route.buffer else _size_of(route.buffer)

    def _acknowledged(self, route: Route, batch: Batch, reply: dict[int, Submitted] | Exception) -> None:
        route.in_the_air -= 1
        route.unacknowledged.discard(batch)
        if isinstance(reply, BrokerUnavailableError):
            self._buffer_again(route, batch.requests)  # idempotent by ref: sent again after the reconnect
            self.give_up_on_old(route, reply)
            if self._lines.is_connected:
                self._hub.loop.call_later(RETRY_S, self.flush, route)
            return
        refs = batch.requests[::FIELDS]
        if self._adopted:
            self._adopted.difference_update(refs)
        if isinstance(reply, Exception):
            self.refused(route, refs, reply)
        else:
            if reply:
                refs = self._not_new(route, batch, reply)
            elif route.patience_s:
                route.patience_s = ROOM_AFTER_S[0]
            for ref in self._unqueued.intersection(refs) if self._unqueued else ():
                self._unqueued.discard(ref)
                if (pending := self._pending.get(ref)) is not None:
                    pending.match()
        if route.buffer:
            self.flush(route)

    def _buffer_again(self, route: Route, requests: list[Any]) -> None:
        """Except what has ended for its caller meanwhile: it may have run, and its result may be gone."""
        for i in range(len(requests) - FIELDS, -1, -FIELDS):
            if requests[i] in self._pending or requests[i] in self._adopted:
                route.buffer[:0] = requests[i : i + FIELDS]

    def _not_new(self, route: Route, batch: Batch, reply: dict[int, Submitted]) -> list[bytes]:
        """Deal with those of a batch that were not taken in as new; the refs of the others, and of those that are there."""
        refs, there, full = batch.requests[::FIELDS], [], set()
        for position, what in reply.items():
            if what is Submitted.FULL:
                full.add(refs[position])
                self._no_room(route, batch.requests[position * FIELDS : (position + 1) * FIELDS])
            else:
                there.append(refs[position])
        if there:  # sent twice, perhaps by another engine of ours, which then has the replies
            self._hub.look_at(route, there, listen=True)
        return [ref for ref in refs if ref not in full] if full else refs

    def _no_room(self, route: Route, request: list[Any]) -> None:
        ref, _, _, extras, _ = request
        if b'"patient"' not in extras:
            self.refused(route, [ref], outcomes.queue_full(route.tag))
            return
        if not route.patient:
            first, last = ROOM_AFTER_S
            route.patience_s = min(last, max(first, 2 * route.patience_s))
            self._hub.loop.call_later(route.patience_s, self._try_again, route)
        route.patient += request

    def _try_again(self, route: Route) -> None:
        """Ask for room again, for the first of those that wait for it; in their order."""
        again, route.patient = route.patient, []
        self._buffer_again(route, again)
        self._prepare(route)

    def refused(self, route: Route, refs: Iterable[bytes], reason: BaseException) -> None:
        """These requests will never be on the server."""
        error = outcomes.no_such_deployment(route.tag) if "NODEPLOYMENT" in str(reason) else reason
        for ref in refs:
            self._unqueued.discard(ref)
            pending = self._pending.pop(ref, None)
            if pending is not None:
                pending.fail(error)

    def _refuse_last(self, route: Route) -> None:
        ref = route.buffer[-FIELDS]
        del route.buffer[-FIELDS:]
        route.buffered_bytes = _size_of(route.buffer)
        self.refused(
            route,
            [ref],
            BackPressureError(
                f"this process has {MOST_BUFFERED_BYTES >> 20} MB of requests to {route.tag} that the server has not taken; "
                "wait for some of their refs first, or use handle.map, which keeps a bounded number in flight",
                deployment=route.tag,
            ),
        )

    def _fail_buffer(self, route: Route, error: Exception) -> None:
        refs, route.buffer, route.buffered_bytes = route.buffer[::FIELDS], [], 0
        self.refused(route, refs, error)

    def withdraw(self, route: Route, ref: bytes, error: BaseException) -> None:
        """Fail a request here, and do not send it (again)."""
        if ref in route.buffer[::FIELDS]:
            i = route.buffer.index(ref)
            del route.buffer[i : i + FIELDS]
        self.refused(route, [ref], error)

    def give_up_on_old(self, route: Route, error: Exception) -> None:
        waiting = (self._pending[ref] for ref in route.buffer[::FIELDS] if ref in self._pending)
        oldest = next(waiting, None)
        if oldest is not None and time.monotonic() - oldest.since > PATIENCE_S:
            self._fail_buffer(route, error)

    def _prepare(self, route: Route) -> None:
        if route.is_ready:
            self.flush(route)
        elif not route.is_preparing:
            route.is_preparing = True
            self._hub.start(self._make_ready(route))

    async def _make_ready(self, route: Route) -> None:
        try:
            await self.ready(route)
        except MillstreamError as e:
            if (
                not self._lines.has_been_up
            ):  # else the connector goes on, flushes in the end, and gives up on what is old
                self._fail_buffer(route, e)
        else:
            self.flush(route)
        finally:
            route.is_preparing = False

    async def ready(self, route: Route) -> Link:
        """The commands link, once replies of this deployment would reach us. Raises BrokerUnavailableError."""
        while True:
            commands = await self._lines.link()
            if route.is_ready:
                return commands
            replies = self._lines.replies
            if replies is not None:
                await replies.ask("SSUBSCRIBE", route.keys.reply(self._hub.name))
                route.is_ready = self._lines.replies is replies


def _size_of(buffer: list[Any]) -> int:
    return sum(map(len, buffer[FIELDS - 1 :: FIELDS])) + len(buffer) // FIELDS * OVERHEAD_BYTES

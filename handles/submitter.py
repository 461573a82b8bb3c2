"""Sends requests in batches: what comes while a batch is in the air goes out together with the next one.

Every request is idempotent by its ref, so a batch whose reply was lost is simply sent again.
"""

import asyncio
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.link import Link
from millstream.broker.scripts import Submitted
from millstream.errors import BackPressureError, BrokerUnavailableError, MillstreamError
from millstream.handles.hub import Hub
from millstream.handles.lines import PATIENCE_S
from millstream.handles.patience import RETRY_S, Answer, Line, Patient
from millstream.handles.route import FIELDS, OVERHEAD_BYTES, Batch, Pending, Route, shorten_deadlines, size_of

FLUSH_REQUESTS = (
    32  # per script call: with more, client, server and replica wait for each other; with less, each call costs more
)
FLUSH_BYTES = 64 * 1024
IN_THE_AIR = 3  # so many submit calls go out without waiting for an answer; then what comes waits to be sent together
MOST_IN_THE_AIR = 100  # calls; what comes then stays in the buffer, whose size is bounded
MOST_BYTES_IN_THE_AIR = 64 * 1024 * 1024
MOST_BUFFERED_BYTES = 256 * 1024 * 1024


class Submitter:
    """The sending half of an engine."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._lines, self._pending = hub, hub.lines, hub.pending
        self._unqueued: set[bytes] = set()  # refs of requests whose callers wait until the server has them
        self._adopted: set[bytes] = set()  # refs of requests that we send for another engine of this process
        self._patient: dict[str, Line] = {}  # tag -> those who wait for room in its queue
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
        elif len(buffer) >= FIELDS * FLUSH_REQUESTS or route.buffered_bytes >= FLUSH_BYTES:
            self.flush(route)
        elif route.in_the_air < IN_THE_AIR and len(buffer) == FIELDS:
            if route.was_alone and not route.in_the_air:
                self.flush(route)  # requests come one by one: nothing else will come in this pass of the loop
            else:
                self._hub.loop.call_soon(self.flush, route)
        if route.buffered_bytes > MOST_BUFFERED_BYTES:
            self._refuse_last(route)

    def submit_all(
        self, route: Route, pendings: list[Pending], requests: list[Any], until_queued: bool = False
    ) -> None:
        """As `submit`, of many requests, flat, and those who hear of their ends."""
        self._pending.update(zip(requests[::FIELDS], pendings, strict=True))
        if until_queued:
            self._unqueued.update(requests[::FIELDS])
        self.sent += len(pendings)
        route.buffer += requests
        route.buffered_bytes += size_of(requests)
        if not route.is_ready:
            self._prepare(route)
        elif (
            not route.in_the_air or len(route.buffer) >= FIELDS * FLUSH_REQUESTS or route.buffered_bytes >= FLUSH_BYTES
        ):
            self.flush(route)
        elif route.in_the_air < IN_THE_AIR and len(route.buffer) == len(requests):
            self._hub.loop.call_soon(self.flush, route)
        while route.buffered_bytes > MOST_BUFFERED_BYTES:
            self._refuse_last(route)

    def submit_patiently(
        self,
        route: Route,
        pending: Pending,
        lane: bytes,
        method: bytes,
        extras: bytes,
        envelope: bytes,
        until_queued: bool = False,
    ) -> None:
        """As `submit`, and where the queue is full, it waits for room; in the order of the calls."""
        ref = pending.ref
        self._pending[ref] = pending
        self.sent += 1
        if until_queued:
            self._unqueued.add(ref)
        if self._line(route).size_bytes > MOST_BUFFERED_BYTES:
            self.refused(route, [ref], too_much(route))
        else:
            self._join_line(route, Patient((ref, lane, method, extras, envelope), partial(self._let_in, route, ref)))

    async def offer(self, route: Route, request: tuple[bytes, bytes, bytes, bytes, bytes]) -> Submitted:
        """Send one request in the line of the patient ones; what the server says once there is room."""
        answer: asyncio.Future[Answer] = self._hub.loop.create_future()
        self._join_line(route, Patient(request, lambda said: None if answer.done() else answer.set_result(said)))
        said = await answer
        if isinstance(said, Exception):
            raise said
        return said

    async def under_way(self, route: Route, ref: bytes) -> None:
        """Return when a request is not here to be sent any more: what we ask next over our connection finds it there."""
        while ref in self.unsent(route):
            await self.ready(route)
            self.flush(route)
            if ref in self.unsent(route):
                await asyncio.sleep(RETRY_S)  # it waits for room, or behind very many

    def has_all_sent(self, route: Route) -> bool:
        """Does nothing wait here to be sent?"""
        return not route.buffer and not self._patient.get(route.tag)

    def unsent(self, route: Route) -> set[bytes]:
        """Refs that the server does not know yet."""
        unsent = set(route.buffer[::FIELDS])
        if (line := self._patient.get(route.tag)) is not None:
            unsent |= line.refs()
        return unsent

    def unacknowledged(self, route: Route) -> list[Any]:
        """All requests that the server may not have, flat; without those that have ended for their callers: they may have
        run, and their results may be gone. Any thread."""
        line = self._patient.get(route.tag)
        requests = [part for batch in list(route.unacknowledged) for part in batch.requests] + route.buffer
        requests += line.requests() if line is not None else []
        return self._still_wanted(requests)

    def on_their_way(self, route: Route) -> set[bytes]:
        """Refs that are sent, or to be sent, and of which the server has not said that it has them."""
        found = self.unsent(route)
        for batch in route.unacknowledged:
            found.update(batch.requests[::FIELDS])
        return found

    def take_back(self, route: Route, ref: bytes) -> bool:
        """Do not send a request (again). False if it is under way just now, or was sent before."""
        refs = route.buffer[::FIELDS]
        if ref in refs:
            i = refs.index(ref) * FIELDS
            route.buffered_bytes -= size_of(route.buffer[i : i + FIELDS])
            del route.buffer[i : i + FIELDS]
            return True
        line = self._patient.get(route.tag)
        return line is not None and ref in line and line.leave(ref)

    def adopt(self, tag: str, requests: list[Any]) -> None:
        """Send requests of another engine of this process."""
        route = self._hub.route(tag)
        for i in range(0, len(requests), FIELDS):
            request = requests[i : i + FIELDS]
            if b'"patient"' in request[3]:
                self._line(route).join(Patient(tuple(request), _ignore, is_adopted=True))
            else:
                self._adopted.add(request[0])
                route.buffer += request
        self._prepare(route)

    def send_again(self, route: Route, request: list[Any]) -> None:
        """One that the server had acknowledged, and has lost."""
        route.buffer += request
        route.buffered_bytes += size_of(request)
        self._prepare(route)

    def flush(self, route: Route) -> None:
        """Put what is buffered for this deployment into the air, at most FLUSH_REQUESTS at a time."""
        commands = self._lines.commands
        if commands is None or not commands.is_up:
            return  # the reconnect flushes
        while route.buffer and route.in_the_air < MOST_IN_THE_AIR and route.bytes_in_the_air < MOST_BYTES_IN_THE_AIR:
            requests = route.buffer[: FIELDS * FLUSH_REQUESTS]
            del route.buffer[: FIELDS * FLUSH_REQUESTS]
            batch = Batch(requests, size_of(requests) if route.buffer else route.buffered_bytes)
            route.buffered_bytes -= batch.size_bytes
            route.was_alone = len(requests) == FIELDS
            if self._hub.deadlines:
                shorten_deadlines(requests, self._pending)
            route.in_the_air += 1
            route.bytes_in_the_air += batch.size_bytes
            route.unacknowledged.add(batch)
            commands.start(
                scripts.submit(route.keys, self._hub.name, batch.requests),
                lambda reply, batch=batch: self._acknowledged(route, batch, reply),  # type: ignore[misc]
            )
        if self._patient and (line := self._patient.get(route.tag)) is not None:
            line.send()

    def _acknowledged(self, route: Route, batch: Batch, reply: dict[int, Submitted] | Exception) -> None:
        route.in_the_air -= 1
        route.bytes_in_the_air -= batch.size_bytes
        route.unacknowledged.discard(batch)
        if isinstance(reply, BrokerUnavailableError):
            again = self._still_wanted(batch.requests)  # idempotent by ref: sent again after the reconnect
            made = [self._pending[ref].since for ref in again[::FIELDS] if ref in self._pending]
            self._hub.drops.may_be_sent_twice(max(made, default=0.0))
            route.buffer[:0] = again
            route.buffered_bytes = size_of(route.buffer)
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
            self._hub.recovery.keep(route, batch)
            if reply:
                refs = self._not_new(route, batch, reply)
            if self._unqueued:
                queued = self._unqueued.intersection(refs)
                self._unqueued -= queued
                for pending in map(self._pending.get, queued):
                    if pending is not None:
                        pending.match()
        if route.buffer:
            self.flush(route)

    def _still_wanted(self, requests: list[Any]) -> list[Any]:
        """Without what has ended for its caller meanwhile: it may have run, and its result may be gone."""
        wanted: list[Any] = []
        for i in range(0, len(requests), FIELDS):
            if requests[i] in self._pending or requests[i] in self._adopted:
                wanted += requests[i : i + FIELDS]
        return wanted

    def _not_new(self, route: Route, batch: Batch, reply: dict[int, Submitted]) -> list[bytes]:
        """Deal with those of a batch that were not taken in as new; the refs of the others, and of those that are there."""
        refs: list[bytes] = batch.requests[::FIELDS]
        there: list[bytes] = []
        full: list[bytes] = []
        for position, what in reply.items():
            (full if what is Submitted.FULL else there).append(refs[position])
        if full:
            self.refused(route, full, outcomes.queue_full(route.tag))
        if there:  # sent twice, perhaps by another engine of ours, which then has the replies
            self._hub.look_at(route, there, listen=True)
        return refs

    # those who wait for room

    def _line(self, route: Route) -> Line:
        line = self._patient.get(route.tag)
        if line is None:
            line = self._patient[route.tag] = Line(self._hub, route)
        return line

    def _join_line(self, route: Route, patient: Patient) -> None:
        line = self._line(route)
        line.join(patient)
        if route.is_ready:
            line.send()
        else:
            self._prepare(route)

    def _let_in(self, route: Route, ref: bytes, answer: Answer) -> None:
        """A patient request has been taken in, or refused for another reason than a full queue."""
        if isinstance(answer, Exception):
            self.refused(route, [ref], answer)
            return
        if answer is not Submitted.NEW:
            self._hub.look_at(route, [ref], listen=True)
        if ref in self._unqueued:
            self._unqueued.discard(ref)
            if (pending := self._pending.get(ref)) is not None:
                pending.match()

    # the end

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
        route.buffered_bytes -= size_of(route.buffer[-FIELDS:])
        del route.buffer[-FIELDS:]
        self.refused(route, [ref], too_much(route))

    def _fail_buffer(self, route: Route, error: Exception) -> None:
        refs, route.buffer, route.buffered_bytes = route.buffer[::FIELDS], [], 0
        self.refused(route, refs, error)

    def refuse_unsent(self, route: Route, error: MillstreamError) -> None:
        """Fail what waits here to be sent."""
        self._fail_buffer(route, error)
        if (line := self._patient.get(route.tag)) is not None:
            line.close(error)

    def give_up_on_old(self, route: Route, error: Exception) -> None:
        waiting = (self._pending[ref] for ref in route.buffer[::FIELDS] if ref in self._pending)
        oldest = next(waiting, None)
        if oldest is not None and time.monotonic() - oldest.since > PATIENCE_S:
            self._fail_buffer(route, error)
        if (line := self._patient.get(route.tag)) is not None:
            line.give_up_if_late(error)

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
            # Of an outage after the first connection, the connector makes an end: it flushes, and gives up on what is old.
            if not self._lines.has_been_up or not isinstance(e, BrokerUnavailableError):
                self.refuse_unsent(route, e)
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


def too_much(route: Route) -> BackPressureError:
    return BackPressureError(
        f"this process has {MOST_BUFFERED_BYTES:,} bytes of requests to {route.tag} that the server has not taken; "
        "wait for some of their refs first, or use handle.map, which keeps a bounded number in flight",
        deployment=route.tag,
    )


def _ignore(answer: Answer) -> None:
    """Of an adopted request: whoever made it looks after it."""

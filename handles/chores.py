"""The few things an engine does in several steps: requests that wait, are large or come after others; following; looking.

Each step may be repeated, and is, over reconnects.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.keys import split_ref
from millstream.broker.scripts import Submitted
from millstream.broker.states import State
from millstream.broker.supplying import Supplier
from millstream.errors import BrokerUnavailableError
from millstream.handles import submitter
from millstream.handles.cell import Cell
from millstream.handles.holding import Holding
from millstream.handles.hub import Hub
from millstream.handles.large import LargeValues
from millstream.handles.lines import PATIENCE_S
from millstream.handles.options import with_time_left
from millstream.handles.patience import RETRY_S
from millstream.handles.route import Pending, Request, Route

WAKES_PER_S = 500  # at most, of one deployment: delayed requests are due to some ms


class Chores:
    """Owns its tasks; they end with the engine."""

    def __init__(self, hub: Hub, large: LargeValues) -> None:
        self._hub, self._lines, self._large = hub, hub.lines, large
        self._supplier = Supplier(hub.settings, hub.lines.run)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sending: dict[bytes, Request] = {}
        self._sending_bytes = 0
        self._holding = Holding(hub, self._sending, self.held, self.send_stepwise, self._supplier)
        self._wakes: set[tuple[str, int]] = set()  # tag, and when, in buckets

    def start(self, chore: Coroutine[Any, Any, Any]) -> None:
        task = self._hub.loop.create_task(chore)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def unsent(self) -> list[Request]:
        """What we have not sent yet, and somebody waits for. Any thread."""
        return [request for ref, request in list(self._sending.items()) if ref in self._hub.pending]

    def adopt(self, request: Request) -> None:
        """Send a request of another engine of this process."""
        pending = Cell(request.pending.codec, request.pending.ref)
        route = self._hub.route(request.route.tag)
        self.send(
            Request(
                route, pending, request.lane, request.method, request.extras, request.envelope,
                depends_on=request.depends_on, mentions=request.mentions, delay_ms=request.delay_ms,
                due_ms=request.due_ms, arguments=request.arguments, payload=request.payload, is_shared=True,
            )
        )  # fmt: skip

    # sending

    def send(self, request: Request) -> None:
        """Send a request that takes more than one step. It is matched when the server holds it, or as `submit` says."""
        ref = request.pending.ref
        self._hub.pending[ref] = request.pending
        self._hub.sender.sent += 1
        if (first := self._sending.get(ref)) is not None:  # of the same idempotency key: the first one counts
            first.until_queued |= request.until_queued
            return
        if self._sending and self._sending_bytes + request.size_bytes > submitter.MOST_BUFFERED_BYTES:
            self._hub.sender.refused(request.route, [ref], submitter.too_much(request.route))
            return
        self._sending[ref] = request
        self._sending_bytes += request.size_bytes
        if request.must_wait and request.payload is None:
            self._holding.send(request)
        else:
            self.start(self._send(request))

    def held(self, request: Request) -> None:
        """The server holds it."""
        self._forget(request)
        self._hub.recovery.keep_request(request)
        self._hub.pending.get(request.pending.ref, request.pending).match()
        self._wake_when_due(request)

    def _forget(self, request: Request) -> None:
        """It is sent, or never will be."""
        if self._sending.get(request.pending.ref) is request:  # not a second one with the same idempotency key
            del self._sending[request.pending.ref]
            self._sending_bytes -= request.size_bytes
        request.acknowledge()

    def send_stepwise(self, request: Request) -> None:
        """Holding it in one go did not work out: step by step, then, and again after a reconnect."""
        self.start(self._send(request))

    def is_sending(self, ref: bytes) -> bool:
        return ref in self._sending

    def take_back(self, ref: bytes) -> bool:
        """Do not send a request. False if the server may have it already, or it is not here."""
        request = self._sending.get(ref)
        if request is None or request.was_submitted:
            return False
        request.is_withdrawn = True
        return True

    async def _send(self, request: Request) -> None:
        route, pending = request.route, request.pending

        async def step() -> None:
            await self._hub.sender.ready(route)
            await self.sent_before([*request.depends_on, *request.mentions])
            answer = await self._offer(request)
            if answer is None:
                return
            request.acknowledge()
            self._hub.recovery.keep_request(request)
            if request.must_wait or request.until_queued:
                self._hub.pending.get(pending.ref, pending).match()
            if answer is not Submitted.NEW:  # sent twice, perhaps by another engine of ours, which then has the reply
                await self._listen(pending)
            waiter_id = f"{route.tag}~{pending.ref.decode()}"
            await asyncio.gather(*[self._supplier.watch(waiter_id, ref_id) for ref_id in request.depends_on])
            self._wake_when_due(request)

        try:
            await self._until_acknowledged(route, pending, step)
        finally:
            self._forget(request)

    async def _offer(self, request: Request) -> Submitted | None:
        """Have the server take the request; None if its caller has given it up meanwhile."""
        self._large.seal(request)
        ref, was_written = request.pending.ref, request.is_written
        if request.payload is not None and not was_written and not request.is_shared:
            await self._large.write_arguments(request)
        while not request.is_withdrawn and ref in self._hub.pending:
            answer = await self._try_to_submit(request)
            if answer is not Submitted.MISSING:
                return answer
            await self._large.write_arguments(request)
        if not was_written:  # else it may have been submitted before a reconnect, and taken
            self._large.forget_arguments(request)
        return None

    async def _try_to_submit(self, request: Request) -> Submitted:
        """What the server says. BackPressureError where the queue is full."""
        request.was_submitted = True
        try:
            answer = await self._submit(request)
            if answer is Submitted.FULL:
                raise outcomes.queue_full(request.route.tag)
        except BrokerUnavailableError:  # it may have been taken
            self._hub.drops.may_be_sent_twice(request.pending.since)
            raise
        except Exception:
            self._large.forget_arguments(request)
            raise
        return answer

    async def _submit(self, request: Request) -> Submitted:
        ref, keys, extras = request.pending.ref, request.route.keys, request.extras
        if b'"timeout_ms"' in extras:
            extras = with_time_left(extras, time.monotonic() - request.pending.since)
        if request.must_wait:
            held: Submitted = await self._lines.run(
                scripts.hold(
                    keys, self._hub.name, ref, request.lane.decode(), request.method, request.envelope,
                    extras=extras, delay_ms=request.delay_ms, due_ms=request.due_ms,
                    depends_on=request.depends_on,
                )
            )  # fmt: skip
            return held
        fields = (ref, request.lane, request.method, extras, request.envelope)
        if b'"patient"' in extras:
            return await self._hub.sender.offer(request.route, fields)
        known = await self._lines.run(scripts.submit(keys, self._hub.name, fields))
        answer: Submitted = known.get(0, Submitted.NEW)
        return answer

    def _wake_when_due(self, request: Request) -> None:
        """Sweepers look about once a second; we know when. A caller that is gone by then leaves it to them."""
        if not (request.delay_ms or request.due_ms):
            return
        delay_s = max(request.delay_ms / 1000, request.due_ms / 1000 - time.time(), 0.0)
        # What is due at about the same time wakes together.
        bucket = int((self._hub.loop.time() + delay_s) * WAKES_PER_S) + 1
        if (request.route.tag, bucket) not in self._wakes:
            self._wakes.add((request.route.tag, bucket))
            self._hub.loop.call_at(bucket / WAKES_PER_S + 0.001, self._wake, request.route, bucket)

    def _wake(self, route: Route, bucket: int) -> None:
        self._wakes.discard((route.tag, bucket))
        self._wake_some(route)

    def _wake_some(self, route: Route) -> None:
        def woken(count: int | Exception) -> None:
            if count == scripts.SWEEP_LIMIT:
                self._wake_some(route)

        if self._lines.commands is not None:
            self._lines.commands.start(scripts.wake(route.keys), woken)

    async def sent_before(self, ref_ids: Iterable[str]) -> None:
        """Return when what we have to send of these requests is under way: commands that follow find them there."""
        for ref_id in ref_ids:
            tag, _, ref = ref_id.partition("~")
            upstream = self._hub.known_route(tag)
            if upstream is not None:
                await self._hub.sender.under_way(upstream, ref.encode())
            request = self._sending.get(ref.encode())
            if request is not None:
                await asyncio.wait([request.acknowledgement(self._hub.loop)])

    # following

    def follow(self, route: Route, pending: Pending) -> None:
        """Hear of the end of a request that somebody else submitted. RefNotFoundError goes to `pending`."""
        self._hub.pending[pending.ref] = self._hub.join(pending)
        self.start(self._follow(route, pending))

    async def _follow(self, route: Route, pending: Pending) -> None:
        async def step() -> None:
            await self._hub.sender.ready(route)
            await self.sent_before([f"{route.tag}~{pending.ref.decode()}"])  # the request itself may still be with us
            await self._listen(pending)

        await self._until_acknowledged(route, pending, step)

    async def _listen(self, pending: Pending) -> None:
        """Have its end told to us, if it has not come yet."""
        route = self._hub.route(pending.codec.tag)
        (answer,) = await self._lines.run(scripts.watch(route.keys, "readers", self._hub.name, [pending.ref.decode()]))
        if (waiting := self._hub.pending.get(pending.ref)) is not None:
            self._hub.answered(waiting, answer)

    async def _until_acknowledged(self, route: Route, pending: Pending, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat an idempotent step over reconnects, for PATIENCE_S; any other error goes to `pending`."""
        self._hub.unregistered.add(pending.ref)
        try:
            while True:
                try:
                    await step()
                    return
                except BrokerUnavailableError:
                    if not self._lines.has_been_up or time.monotonic() - pending.since > PATIENCE_S:
                        raise
                    await asyncio.sleep(RETRY_S)
        except Exception as e:
            self._hub.sender.refused(route, [pending.ref], e)
        finally:
            self._hub.unregistered.discard(pending.ref)

    # looking

    async def state(self, ref_id: str) -> State:
        """Where a request is now. Raises RefNotFoundError, BrokerUnavailableError."""
        tag, ref = split_ref(ref_id)
        await self._lines.link()
        await self.sent_before([ref_id])
        state: State | None = await self._lines.run(scripts.place(self._hub.route(tag).keys, ref))
        if state is None:
            raise outcomes.not_found(ref_id)
        return state

    async def see_whether_matched(self, pending: Pending) -> None:
        """The notice that a replica has taken the request may have been lost; or it was taken before we asked."""
        try:
            state = await self._lines.run(scripts.place(self._hub.route(pending.codec.tag).keys, pending.ref.decode()))
        except BrokerUnavailableError:
            return
        if state is not State.QUEUED:
            pending.match()

"""The few things an engine does in several steps: requests that wait, are large or come after others; cancelling; looking.

Each step may be repeated, and is, over reconnects.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.keys import split_ref
from millstream.broker.scripts import Ended, Submitted
from millstream.broker.states import State
from millstream.broker.supplying import Supplier
from millstream.errors import BrokerUnavailableError, MillstreamError, RequestTimeoutError
from millstream.handles.cell import Cell
from millstream.handles.hub import Hub
from millstream.handles.large import LargeValues
from millstream.handles.lines import PATIENCE_S
from millstream.handles.route import Pending, Request, Route
from millstream.handles.submitter import RETRY_S, ROOM_AFTER_S

CANCELLED = "its caller cancelled it"


class Chores:
    """Owns its tasks; they end with the engine."""

    def __init__(self, hub: Hub, large: LargeValues) -> None:
        self._hub, self._lines, self._large = hub, hub.lines, large
        self._supplier = Supplier(hub.settings, hub.lines.run)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sending: dict[bytes, Request] = {}

    def start(self, chore: Coroutine[Any, Any, Any]) -> None:
        task = self._hub.loop.create_task(chore)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def unsent(self) -> list[Request]:
        """What we have not sent yet. Any thread."""
        return list(self._sending.values())

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
        self._hub.pending[request.pending.ref] = request.pending
        self._hub.sender.sent += 1
        request.acknowledged = self._hub.loop.create_future()
        self._sending[request.pending.ref] = request
        self.start(self._send(request))

    async def _send(self, request: Request) -> None:
        route, pending = request.route, request.pending

        async def step() -> None:
            await self._hub.sender.ready(route)
            await self.sent_before([*request.depends_on, *request.mentions])
            answer = await self._offer(request)
            if answer is None:
                return
            request.acknowledge()
            if request.must_wait or request.until_queued:
                pending.match()
            if answer is not Submitted.NEW:  # sent twice, perhaps by another engine of ours, which then has the reply
                await self._listen(pending)
            waiter_id = f"{route.tag}~{pending.ref.decode()}"
            await asyncio.gather(*[self._supplier.watch(waiter_id, ref_id) for ref_id in request.depends_on])
            self._wake_when_due(request)

        try:
            await self._until_acknowledged(route, pending, step)
        finally:
            if self._sending.get(pending.ref) is request:  # not a second one with the same idempotency key
                del self._sending[pending.ref]
            request.acknowledge()

    async def _offer(self, request: Request) -> Submitted | None:
        """Have the server take the request; None if its caller has given it up meanwhile."""
        await self._large.seal(request)
        was_written = request.is_written
        if request.payload is not None and not was_written and not request.is_shared:
            await self._large.write_arguments(request)
        while request.pending.ref in self._hub.pending:
            answer = await self._submit_patiently(request)
            if answer is not Submitted.MISSING:
                return answer
            await self._large.write_arguments(request)
        if not was_written:  # else it may have been submitted before a reconnect, and taken
            self._large.forget_arguments(request)
        return None

    async def _submit_patiently(self, request: Request) -> Submitted:
        try:
            answer = await self._submit(request)
            room_after_s, last_s = ROOM_AFTER_S
            while (
                answer is Submitted.FULL and b'"patient"' in request.extras and request.pending.ref in self._hub.pending
            ):
                await asyncio.sleep(room_after_s)
                room_after_s = min(last_s, 2 * room_after_s)
                answer = await self._submit(request)
            if answer is Submitted.FULL:
                raise outcomes.queue_full(request.route.tag)
        except BrokerUnavailableError:
            raise  # it may have been taken
        except Exception:
            self._large.forget_arguments(request)
            raise
        return answer

    async def _submit(self, request: Request) -> Submitted:
        ref, keys = request.pending.ref, request.route.keys
        if request.must_wait:
            held: Submitted = await self._lines.run(
                scripts.hold(
                    keys, self._hub.name, ref, request.lane.decode(), request.method, request.envelope,
                    extras=request.extras, delay_ms=request.delay_ms, due_ms=request.due_ms,
                    depends_on=request.depends_on,
                )
            )  # fmt: skip
            return held
        fields = (ref, request.lane, request.method, request.extras, request.envelope)
        known = await self._lines.run(scripts.submit(keys, self._hub.name, fields))
        answer: Submitted = known.get(0, Submitted.NEW)
        return answer

    def _wake_when_due(self, request: Request) -> None:
        """Sweepers look about once a second; we know when. A caller that is gone by then leaves it to them."""
        delay_s = max(request.delay_ms / 1000, request.due_ms / 1000 - time.time())
        if delay_s <= 0:
            return

        def wake() -> None:
            commands = self._lines.commands
            if commands is not None:
                commands.start(scripts.wake(request.route.keys), _ignore)

        self._hub.loop.call_later(delay_s + 0.002, wake)

    async def sent_before(self, ref_ids: Iterable[str]) -> None:
        """Return when what we have to send of these requests is under way: commands that follow find them there."""
        for ref_id in ref_ids:
            tag, _, ref = ref_id.partition("~")
            upstream = self._hub.known_route(tag)
            if upstream is not None and upstream.buffer:
                await self._hub.sender.ready(upstream)
                self._hub.sender.flush(upstream)
            request = self._sending.get(ref.encode())
            if request is not None and request.acknowledged is not None:
                await asyncio.wait([request.acknowledged])

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

    # ending

    async def cancel(self, ref_id: str) -> bool:
        """Cancel a request; False if it has ended before, or is unknown. Raises BrokerUnavailableError."""
        tag, ref = split_ref(ref_id)
        route = self._hub.route(tag)
        await self._lines.link()
        await self.sent_before([ref_id])
        call = scripts.cancel(route.keys, outcomes.ENDED_TTL_S, CANCELLED, [ref])
        (answer,), waiters = await self._lines.run(call)
        await self._supplier.supply_all(tag, waiters)
        return answer[0] is Ended.ENDED

    def cancel_soon(self, ref_id: str) -> None:
        """As `cancel`, for who does not wait for it; without a connection, the request just goes on."""
        self.start(_unless_down(self.cancel(ref_id)))

    def expire(self, tag: str, ref: bytes) -> None:
        """The time of a request of ours should be up: have the server decide. Without a server, it is up."""
        route = self._hub.route(tag)
        if not self._lines.is_connected:
            error = RequestTimeoutError(
                f"request {tag}~{ref.decode()} had no result in time, and the server is not reachable; "
                "it is not sent again, but may run if the server had it before",
                ref_id=f"{tag}~{ref.decode()}",
            )
            self._hub.sender.withdraw(route, ref, error)
            return
        self.start(_unless_down(self._expire(route, ref)))

    async def _expire(self, route: Route, ref: bytes) -> None:
        await self.sent_before([f"{route.tag}~{ref.decode()}"])
        call = scripts.cancel(route.keys, outcomes.ENDED_TTL_S, outcomes.OVERDUE, [ref], overdue=True)
        ((what, left_ms),), waiters = await self._lines.run(call)
        if what is Ended.EARLY and left_ms >= 0:
            self._hub.deadlines.add(route.tag, ref, left_ms / 1000)
        await self._supplier.supply_all(route.tag, waiters)

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


async def _unless_down(chore: Coroutine[Any, Any, Any]) -> None:
    try:
        await chore
    except MillstreamError:
        return


def _ignore(reply: Any) -> None:
    """A hint, or something with a TTL: nothing depends on it."""

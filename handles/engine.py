"""The engine: one per event loop, it submits requests and hands results to whoever waits for them.

Two connections: commands go out on one, results and notices come in on the other. Messages are hints, the record in
Redis is the truth: after each reconnect, and at a bounded rate all the time, the engine re-reads what it waits for.
"""

import asyncio
import functools
import itertools
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.link import Link, Messages
from millstream.broker.scripts import Submitted
from millstream.broker.supplying import Supplier
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError, MillstreamError
from millstream.handles.cell import Cell
from millstream.handles.lines import PATIENCE_S, Lines
from millstream.handles.patrol import LOOK_AT_ONCE, Patrol
from millstream.handles.route import Batch, Hold, Pending, Route

FIELDS = 5  # of one request in a submit call
FLUSH_REQUESTS = 64  # a fuller script call gains nothing and delays the others
FLUSH_BYTES = 64 * 1024
IN_THE_AIR = 3  # so many submit calls go out without waiting for an answer; then what comes waits to be sent together
RETRY_S = 0.05  # for a server that answers and cannot take requests now: loading, or demoted to a replica


class Engine:
    """Make one with `engines.current()`. All methods but those that say otherwise belong to the engine's own loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.name = os.urandom(8).hex()  # of this client: the last part of its reply channels
        self.is_closed = False
        self.now = time.monotonic
        self._ref_prefix, self._ref_numbers = os.urandom(6).hex().encode(), itertools.count()
        self._routes: dict[str, Route] = {}
        self._pending: dict[bytes, Pending] = {}
        self._lines = Lines(settings, self.name, self)
        self._patrol = Patrol(self._pending, self._lines, self.route, self._look_at)
        self._messages = Messages()
        self._chores: set[asyncio.Task[Any]] = set()
        self._supplier = Supplier(settings, self._lines.run)
        self._unqueued: set[bytes] = set()  # refs of requests whose callers wait until the server has them
        self._unregistered: set[bytes] = set()  # refs of holds and follows under way: the server may not know them yet
        self._holding: dict[bytes, Hold] = {}
        self._sent = 0  # requests so far
        self._handed_over: tuple[Engine | None, int] = (None, 0)  # to whom, up to which of them
        self._closer: AsyncGenerator[None, None] | None = None

    # what handles use

    def new_ref(self) -> bytes:
        """22 characters: 48 random bits of this engine and a counter; never the same twice on one server. Any thread."""
        return b"%b%010x" % (self._ref_prefix, next(self._ref_numbers))

    def route(self, tag: str) -> Route:
        """The route to a deployment. Any thread."""
        route = self._routes.get(tag)
        if route is None:
            route = self._routes.setdefault(tag, Route(self.settings, tag))
        return route

    def submit(self, route: Route, pending: Pending, method: bytes, want: bytes, envelope: bytes) -> None:
        """Send a request; `pending` hears of its end. Twice with the same ref is as once.

        It is matched when a replica has taken it, and with `want` = "queued" when the server has.
        """
        self._pending[pending.ref] = pending
        self._sent += 1
        if want == b"queued":
            self._unqueued.add(pending.ref)
            want = b""
        buffer = route.buffer
        buffer += (pending.ref, b"normal", method, want, envelope)
        route.buffered_bytes += len(envelope)
        if not route.is_ready:
            self._prepare(route)
        elif not route.in_the_air or len(buffer) >= FIELDS * FLUSH_REQUESTS or route.buffered_bytes >= FLUSH_BYTES:
            self._flush(route)
        elif route.in_the_air < IN_THE_AIR and len(buffer) == FIELDS:
            self.loop.call_soon(self._flush, route)

    def submit_after(
        self, refs: Iterable[str], route: Route, pending: Pending, method: bytes, want: bytes, envelope: bytes
    ) -> None:
        """As `submit`, but not before these requests of ours: a replica may ask for them at once."""
        self._pending[pending.ref] = pending
        self._start_chore(self._submit_after(list(refs), route, pending, method, want, envelope))

    def hold(
        self,
        route: Route,
        pending: Pending,
        method: bytes,
        envelope: bytes,
        depends_on: list[str],
        delay_s: float = 0.0,
    ) -> None:
        """Send a request that must wait: for refs, or for its time. `pending` is matched once the server holds it."""
        self._pending[pending.ref] = pending
        self._sent += 1
        acknowledged: asyncio.Future[None] = self.loop.create_future()
        hold = Hold(route, pending, method, envelope, depends_on, delay_s, acknowledged)
        self._holding[pending.ref] = hold
        self._start_chore(self._hold(hold))

    def give_up(self, route: Route, ref: bytes, error: BaseException) -> None:
        """Fail a request here because another one that it needs will never be on the server. Any thread."""
        self.loop.call_soon_threadsafe(self._refused, route, [ref], error)

    def follow(self, route: Route, pending: Pending) -> None:
        """Hear of the end of a request that somebody else submitted. RefNotFoundError goes to `pending`."""
        self._pending[pending.ref] = pending
        self._start_chore(self._follow(route, pending))

    async def put(self, route: Route, ref: bytes, envelope: bytes, ttl_s: float) -> None:
        """Store a value under a ref of its own."""
        commands = await self._lines.link()
        stored = b"succeeded - -\n" + envelope
        await commands.ask("SET", route.keys.result(ref.decode()), stored, "PX", int(ttl_s * 1000))

    def resubmit_elsewhere(self, other: "Engine") -> None:
        """Hand what is not acknowledged to another engine as well: our loop is blocked, or stands still. Any thread."""
        if self._handed_over == (other, self._sent):
            return  # that was for another ref, and nothing has come since
        self._handed_over = (other, self._sent)
        for route in list(self._routes.values()):
            requests = [part for batch in route.unacknowledged for part in batch.requests] + route.buffer
            if requests:
                other.loop.call_soon_threadsafe(other._adopt_requests, route.tag, requests)
        for hold in list(self._holding.values()):
            other.loop.call_soon_threadsafe(other._adopt_hold, hold)

    def _adopt_requests(self, tag: str, requests: list[Any]) -> None:
        route = self.route(tag)
        route.buffer += requests
        self._prepare(route)

    def _adopt_hold(self, hold: Hold) -> None:
        pending = Cell(hold.pending.codec, hold.pending.ref)
        self.hold(self.route(pending.codec.tag), pending, hold.method, hold.envelope, hold.depends_on, hold.delay_s)

    def close(self) -> None:
        """Close the connections; whoever still waits gets BrokerUnavailableError. Twice is as once."""
        if self.is_closed:
            return
        self.is_closed = True
        for task in self._chores:
            task.cancel()
        self._lines.close()
        error = BrokerUnavailableError(
            "the connection was closed by millstream.shutdown() or the end of its event loop"
        )
        for pending in list(self._pending.values()):
            pending.fail(error)
            if isinstance(pending, asyncio.Future) and not pending.cancelled():
                pending.exception()  # who awaits it gets it; where nobody does, asyncio need not say so
        self._pending.clear()

    # submitting

    def _flush(self, route: Route) -> None:
        """Put everything buffered for this deployment into the air, at most FLUSH_REQUESTS at a time."""
        commands = self._lines.commands
        if commands is None or not commands.is_up:
            return  # the reconnect flushes
        while route.buffer:
            batch = Batch(route.buffer[: FIELDS * FLUSH_REQUESTS])
            del route.buffer[: FIELDS * FLUSH_REQUESTS]
            route.in_the_air += 1
            route.unacknowledged.add(batch)
            commands.start(
                scripts.submit(route.keys, self.name, batch.requests),
                lambda reply, batch=batch: self._acknowledged(route, batch, reply),  # type: ignore[misc]
            )
        route.buffered_bytes = 0

    def _acknowledged(self, route: Route, batch: Batch, reply: dict[int, Submitted] | Exception) -> None:
        route.in_the_air -= 1
        route.unacknowledged.discard(batch)
        if isinstance(reply, BrokerUnavailableError):
            route.buffer[:0] = batch.requests  # idempotent by ref: sent again after the reconnect
            self._give_up_on_old_submits(route, reply)
            if self._lines.is_connected:
                self.loop.call_later(RETRY_S, self._flush, route)
            return
        refs = batch.requests[::FIELDS]
        if isinstance(reply, Exception):
            self._refused(route, refs, reply)
        else:
            for ref in self._unqueued.intersection(refs) if self._unqueued else ():
                self._unqueued.discard(ref)
                if (pending := self._pending.get(ref)) is not None:
                    pending.match()
            if reply:  # sent twice, perhaps by another engine of ours, which then has the replies
                self._look_at(route, [refs[position] for position in reply], listen=True)
        if route.buffer:
            self._flush(route)

    def _refused(self, route: Route, refs: Iterable[bytes], reason: BaseException) -> None:
        error = outcomes.no_such_deployment(route.tag) if "NODEPLOYMENT" in str(reason) else reason
        for ref in refs:
            self._unqueued.discard(ref)
            pending = self._pending.pop(ref, None)
            if pending is not None:
                pending.fail(error)

    def _fail_buffer(self, route: Route, error: Exception) -> None:
        refs, route.buffer = route.buffer[::FIELDS], []
        self._refused(route, refs, error)

    # chores: the few things that take several steps

    def _start_chore(self, chore: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _prepare(self, route: Route) -> None:
        if route.is_ready:
            self._flush(route)
        elif not route.is_preparing:
            route.is_preparing = True
            self._start_chore(self._make_ready(route))

    async def _make_ready(self, route: Route) -> None:
        try:
            await self._ready(route)
        except MillstreamError as e:
            if (
                not self._lines.has_been_up
            ):  # else the connector goes on, flushes in the end, and gives up on what is old
                self._fail_buffer(route, e)
        else:
            self._flush(route)
        finally:
            route.is_preparing = False

    async def _ready(self, route: Route) -> Link:
        """The commands link, once replies of this deployment would reach us. Raises BrokerUnavailableError."""
        while True:
            commands = await self._lines.link()
            if route.is_ready:
                return commands
            replies = self._lines.replies
            if replies is not None:
                await replies.ask("SSUBSCRIBE", route.keys.reply(self.name))
                route.is_ready = self._lines.replies is replies

    async def _submit_after(
        self, refs: list[str], route: Route, pending: Pending, method: bytes, want: bytes, envelope: bytes
    ) -> None:
        await self._until_acknowledged(route, pending, functools.partial(self._sent_before, refs))
        if pending.ref in self._pending:
            self.submit(route, pending, method, want, envelope)

    async def _sent_before(self, ref_ids: Iterable[str]) -> None:
        """Return when what we have to send of these requests is under way: commands that follow find them there."""
        for ref_id in ref_ids:
            tag, _, ref = ref_id.partition("~")
            upstream = self._routes.get(tag)
            if upstream is not None and upstream.buffer:
                await self._ready(upstream)
                self._flush(upstream)
            if (hold := self._holding.get(ref.encode())) is not None:
                await asyncio.wait([hold.acknowledged])

    async def _hold(self, hold: Hold) -> None:
        route, pending = hold.route, hold.pending

        async def step() -> None:
            await self._ready(route)
            await self._sent_before(hold.depends_on)
            if pending.ref not in self._pending:
                return  # given up: one that it depends on was refused
            call = scripts.hold(
                route.keys, self.name, pending.ref, "normal", hold.method, hold.envelope,
                delay_ms=int(hold.delay_s * 1000), depends_on=hold.depends_on,
            )  # fmt: skip
            answer = await self._lines.run(call)
            if not hold.acknowledged.done():
                hold.acknowledged.set_result(None)
            pending.match()
            ref = pending.ref.decode()
            if answer is not Submitted.NEW:  # sent twice, perhaps by another engine of ours, which then has the reply
                (stored,) = await self._lines.run(scripts.watch(route.keys, "readers", self.name, [ref]))
                self._answered(pending, stored)
            waiter_id = f"{route.tag}~{ref}"
            await asyncio.gather(*[self._supplier.watch(waiter_id, ref_id) for ref_id in hold.depends_on])

        try:
            await self._until_acknowledged(route, pending, step)
        finally:
            del self._holding[pending.ref]
            if not hold.acknowledged.done():
                hold.acknowledged.set_result(None)

    async def _follow(self, route: Route, pending: Pending) -> None:
        async def step() -> None:
            await self._ready(route)
            ref = pending.ref.decode()
            await self._sent_before([f"{route.tag}~{ref}"])  # the request itself may still be with us
            (answer,) = await self._lines.run(scripts.watch(route.keys, "readers", self.name, [ref]))
            self._answered(pending, answer)

        await self._until_acknowledged(route, pending, step)

    async def _until_acknowledged(self, route: Route, pending: Pending, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat an idempotent step over reconnects, for PATIENCE_S; any other error goes to `pending`."""
        self._unregistered.add(pending.ref)
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
            self._refused(route, [pending.ref], e)
        finally:
            self._unregistered.discard(pending.ref)

    # results

    def on_message(self, message: bytes) -> None:
        items = self._messages.read(message)
        pendings = self._pending
        for i in range(0, len(items), 2):
            ref, stored = items[i], items[i + 1]
            pending = pendings.get(ref)
            if pending is None:
                continue
            if stored[-1:] != b"\n":
                del pendings[ref]
                pending.settle(stored)
            elif outcomes.is_running(stored):
                pending.match()
            else:
                self._look_at(self.route(pending.codec.tag), [ref])

    def _look_at(self, route: Route, refs: list[bytes], *, listen: bool = False) -> None:
        """Read what became of some refs; the answer settles them. With `listen`, hear of the end of those still open."""
        commands, refs = self._lines.commands, self._sent_of(route, refs)
        if commands is None or not refs:
            return

        def answered(reply: list[bytes] | Exception) -> None:
            if not isinstance(reply, Exception):  # else the link is down, and the reconnect looks again
                self._all_answered(refs, reply)

        how, who = ("readers", self.name) if listen else ("", "")
        commands.start(scripts.watch(route.keys, how, who, refs), answered)

    def _sent_of(self, route: Route, refs: list[bytes]) -> list[bytes]:
        """Those that the server may know: of the others it would say that they never existed."""
        if route.buffer or self._unregistered:
            unsent = self._unregistered.union(route.buffer[::FIELDS])
            return [ref for ref in refs if ref not in unsent]
        return refs

    def _all_answered(self, refs: list[bytes], answers: list[bytes]) -> None:
        for ref, answer in zip(refs, answers, strict=True):
            pending = self._pending.get(ref)
            if pending is not None:
                self._answered(pending, answer)

    def _answered(self, pending: Pending, answer: bytes) -> None:
        if answer == b"open":
            return
        self._pending.pop(pending.ref, None)
        if answer == b"unknown":
            pending.fail(outcomes.not_found(f"{pending.codec.tag}~{pending.ref.decode()}"))
        else:
            pending.settle(answer)

    # what the lines tell us

    async def on_first_up(self) -> None:
        """From now on the end of the loop closes us."""
        if self._closer is None:
            self._closer = _close_with_loop(self)
            await anext(self._closer)

    def on_lost(self) -> None:
        self._messages = Messages()
        for route in self._routes.values():
            route.is_ready = False

    def on_failed_try(self, error: BrokerUnavailableError) -> None:
        for route in self._routes.values():
            self._give_up_on_old_submits(route, error)

    async def on_back(self) -> None:
        """After a reconnect: subscribe again, send what was not acknowledged, re-read the rest."""
        try:
            for route in list(self._routes.values()):
                await self._ready(route)
                self._flush(route)
            await self._read_again()
        except MillstreamError:
            return  # lost again; the next connection starts over

    def on_tick(self) -> None:
        self._patrol.step()

    def _give_up_on_old_submits(self, route: Route, error: Exception) -> None:
        waiting = (self._pending[ref] for ref in route.buffer[::FIELDS] if ref in self._pending)
        oldest = next(waiting, None)
        if oldest is not None and time.monotonic() - oldest.since > PATIENCE_S:
            self._fail_buffer(route, error)

    async def _read_again(self) -> None:
        """Look up all that is pending, oldest first, one script at a time: messages about it may have been lost."""
        by_tag: dict[str, list[bytes]] = {}
        for ref, pending in self._pending.items():
            by_tag.setdefault(pending.codec.tag, []).append(ref)
        for tag, pendings in by_tag.items():
            route = self.route(tag)
            for start in range(0, len(pendings), LOOK_AT_ONCE):
                if refs := self._sent_of(route, pendings[start : start + LOOK_AT_ONCE]):
                    self._all_answered(refs, await self._lines.run(scripts.watch(route.keys, "", "", refs)))


async def _close_with_loop(engine: Engine) -> AsyncGenerator[None, None]:
    """Started once and never resumed: `asyncio.run` closes all such generators at the end of the loop, and so the engine."""
    try:
        yield
    finally:
        engine.close()

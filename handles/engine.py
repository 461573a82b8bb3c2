"""The engine: one per event loop, it submits requests and hands results to whoever waits for them.

Two connections: commands go out on one, results and notices come in on the other (large values have others).
Messages are hints, the record in Redis is the truth: after each reconnect, and at a bounded rate all the time, the
engine re-reads what it waits for. What takes more than one step is in `chores`.
"""

import asyncio
import itertools
import os
import string
import time
from collections.abc import AsyncGenerator, Iterable

from millstream.broker import outcomes, scripts
from millstream.broker.codec import Verified
from millstream.broker.link import Messages
from millstream.broker.signed import Signer
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError, MillstreamError
from millstream.handles.cell import Cell
from millstream.handles.chores import Chores
from millstream.handles.deadlines import Deadlines
from millstream.handles.drops import Drops
from millstream.handles.endings import Endings
from millstream.handles.large import LargeValues
from millstream.handles.lines import Lines
from millstream.handles.patrol import LOOK_AT_ONCE, Patrol
from millstream.handles.recovery import Recovery
from millstream.handles.route import Pending, Route, Several
from millstream.handles.submitter import Submitter

IN_BLOCK = [one.encode() for one in string.ascii_letters + string.digits + "-_"]  # how the refs of one block end
NEWLINE = b"\n"[0]  # ends what is only announced, and notices
SIGNED = b"s"[0], b"f"[0]  # succeeded, failed: these bear a signature, and what begins otherwise is only looked up


class Engine:
    """Make one with `engines.current()`. All methods but those that say otherwise belong to the engine's own loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.name = os.urandom(8).hex()  # of this client: the last part of its reply channels
        self.is_closed = False
        self.now = time.monotonic
        self.lines = Lines(settings, self.name, self)
        self.pending: dict[bytes, Pending] = {}
        self.unregistered: set[bytes] = set()  # refs that a chore is about: the server may not know them yet
        self.sender = Submitter(self)
        self.submit = self.sender.submit
        self.large = LargeValues(self)
        self.chores = Chores(self, self.large)
        self.start = self.chores.start
        self.recovery = Recovery(self, self.chores.send)
        self.drops = Drops(self.lines, self.route)
        self.endings = Endings(self)
        self.deadlines = Deadlines(self.loop, self.pending, self.endings.expire)
        self._ref_prefix, self._ref_numbers = os.urandom(6).hex().encode(), itertools.count()
        self._block_prefix, self._blocks = os.urandom(6).hex().encode(), itertools.count()
        self._routes: dict[str, Route] = {}
        self._patrol = Patrol(self.pending, self.lines, Signer(settings), self.route, self.look_at)
        self._messages = Messages()
        self._doubted: dict[bytes, str] = {}  # ref -> tag of what a message told of without a signature
        self._handed_over: tuple[Engine | None, int] = (None, 0)  # to whom, up to which of them
        self._closer: AsyncGenerator[None, None] | None = None

    # what handles use

    def new_ref(self) -> bytes:
        """22 characters: 48 random bits of this engine and a counter; never the same twice on one server. Any thread."""
        return b"%b%010x" % (self._ref_prefix, next(self._ref_numbers))

    def new_refs(self, count: int) -> list[bytes]:
        """So many of them, in a quarter of the time: a block of refs takes one step of a counter. Any thread."""
        if count < len(IN_BLOCK) // 4:
            return [self.new_ref() for _ in range(count)]
        refs: list[bytes] = []
        while len(refs) < count:
            block = b"%b%09x" % (self._block_prefix, next(self._blocks))
            refs += [block + number for number in IN_BLOCK[: count - len(refs)]]
        return refs

    def made(self, ref: bytes) -> bool:
        """Is this one of `new_ref`, and of no other process? A ref that stands for an idempotency key is everybody's."""
        return ref.startswith((self._ref_prefix, self._block_prefix))

    def route(self, tag: str) -> Route:
        """The route to a deployment. Any thread."""
        route = self._routes.get(tag)
        if route is None:
            route = self._routes.setdefault(tag, Route(self.settings, tag))
        return route

    def known_route(self, tag: str) -> Route | None:
        return self._routes.get(tag)

    def join(self, pending: Pending) -> Pending:
        """`pending`, together with whoever waits for the same request already: submit or follow with what this returns."""
        known = self.pending.get(pending.ref)
        return pending if known is None or known is pending else Several.of(known, pending)

    def cell_of(self, ref: bytes) -> Cell | None:
        """The cell of a request that this engine waits for already, to be shared. Any thread."""
        known = self.pending.get(ref)
        for one in known.pendings if isinstance(known, Several) else (known,):
            if type(one) is Cell and not one.is_private:
                return one
        return None

    def on_their_way(self, route: Route, refs: Iterable[bytes]) -> set[bytes]:
        """Those of these refs that we send, and the server has not said that it has them."""
        sent = self.sender.on_their_way(route)
        return {ref for ref in refs if ref in sent or self.chores.is_sending(ref)}

    def may_be_on_its_way(self, route: Route, ref: bytes) -> bool:
        """Do we send it, and the server has not said that it has it?"""
        return bool(self.on_their_way(route, [ref]))

    def take_back(self, route: Route, ref: bytes) -> bool:
        """Do not send a request (again). False if it is under way just now, or with the server."""
        return self.chores.take_back(ref) or self.sender.take_back(route, ref)

    def give_up(self, route: Route, ref: bytes, error: BaseException) -> None:
        """Fail a request here because another one that it needs will never be on the server. Any thread."""
        self.loop.call_soon_threadsafe(self.sender.refused, route, [ref], error)

    def resubmit_elsewhere(self, other: "Engine") -> None:
        """Hand what is not acknowledged to another engine as well: our loop is blocked, or stands still. Any thread."""
        if self._handed_over == (other, self.sender.sent):
            return  # that was for another ref, and nothing has come since
        self._handed_over = (other, self.sender.sent)
        self.drops.may_be_sent_twice(self.now())
        for route in list(self._routes.values()):
            if requests := self.sender.unacknowledged(route):
                other.loop.call_soon_threadsafe(other.sender.adopt, route.tag, requests)
        for request in self.chores.unsent():
            other.loop.call_soon_threadsafe(other.chores.adopt, request)

    def close(self, *, tell_who_waits: bool = True) -> None:
        """Close the connections; whoever still waits gets BrokerUnavailableError. Twice is as once."""
        if self.is_closed:
            return
        self.is_closed = True
        self.chores.close()
        self.deadlines.close()
        self.drops.flush()
        self.lines.close()
        if not tell_who_waits:
            return
        error = BrokerUnavailableError(
            "the connection was closed by millstream.shutdown() or the end of its event loop"
        )
        for pending in list(self.pending.values()):
            pending.fail(error)
            if isinstance(pending, asyncio.Future) and not pending.cancelled():
                pending.exception()  # who awaits it gets it; where nobody does, asyncio need not say so
        self.pending.clear()

    # results

    def on_message(self, message: bytes) -> None:
        items = self._messages.read(message)
        pendings = self.pending
        private: list[bytes] = []
        sure_after = self.drops.sure_after
        pending = None
        for i in range(0, len(items), 2):
            ref, stored = items[i], items[i + 1]
            pending = pendings.get(ref)
            if pending is None:
                continue
            if stored and stored[-1] != NEWLINE and stored[0] in SIGNED:
                del pendings[ref]
                if pending.is_private and pending.since > sure_after:
                    private.append(ref)
                pending.settle(stored)
            elif outcomes.is_running(stored):
                pending.match()
            elif outcomes.is_item(stored):
                pending.item(stored)
            elif outcomes.large_part(stored) is not None:
                self.answered(pending, stored)
            else:
                self._doubt(pending)
        if private and pending is not None and sure_after == self.drops.sure_after:  # else another thread has them sent
            self.drops.add_all(pending.codec.tag, private)

    def _doubt(self, pending: Pending) -> None:
        """Who may publish can send any text. What bears no signature is read from the record, together with what comes
        at the same time: all that an application's end has cancelled, say."""
        if not self._doubted:
            self.loop.call_soon(self._look_up)
        self._doubted[pending.ref] = pending.codec.tag

    def _look_up(self) -> None:
        doubted, self._doubted = self._doubted, {}
        by_tag: dict[str, list[bytes]] = {}
        for ref, tag in doubted.items():
            by_tag.setdefault(tag, []).append(ref)
        for tag, refs in by_tag.items():
            for start in range(0, len(refs), LOOK_AT_ONCE):
                self.look_at(self.route(tag), refs[start : start + LOOK_AT_ONCE])

    def look_at(self, route: Route, refs: list[bytes], *, listen: bool = False) -> None:
        """Read what became of some refs; the answer settles them. With `listen`, hear of the end of those still open."""
        commands, refs = self.lines.commands, self._sent_of(route, refs)
        if commands is None or not refs:
            return

        def answered(reply: list[bytes] | Exception) -> None:
            if not isinstance(reply, Exception):  # else the link is down, and the reconnect looks again
                self._all_answered(refs, reply)

        how, who = ("readers", self.name) if listen else ("", "")
        commands.start(scripts.watch(route.keys, how, who, refs), answered)

    def _sent_of(self, route: Route, refs: list[bytes]) -> list[bytes]:
        """Those that the server may know: of the others it would say that they never existed."""
        unsent = self.sender.unsent(route) | self.unregistered
        return [ref for ref in refs if ref not in unsent] if unsent else refs

    def _all_answered(self, refs: list[bytes], answers: list[bytes]) -> None:
        for ref, answer in zip(refs, answers, strict=True):
            pending = self.pending.get(ref)
            if pending is not None:
                self.answered(pending, answer)

    def answered(self, pending: Pending, answer: bytes) -> None:
        """`answer` is what `scripts.watch` said of this request."""
        if answer == b"open":
            if pending.look_again():
                self.chores.start(self.chores.see_whether_matched(pending))
            return
        if outcomes.large_part(answer) is not None:
            self.large.fetch(pending, answer)
            return
        if answer == b"unknown" and self._may_come_yet(pending):
            return
        self.pending.pop(pending.ref, None)
        if answer == b"unknown":
            pending.fail(outcomes.not_found(f"{pending.codec.tag}~{pending.ref.decode()}"))
        else:
            self.settle(pending, answer)

    def _may_come_yet(self, pending: Pending) -> bool:
        """The server does not know this request. Was it refused when we asked, by a server that still loads its data say,
        and is to be sent again? Or has the server lost it?"""
        route = self.route(pending.codec.tag)
        return self.may_be_on_its_way(route, pending.ref) or self.recovery.takes(pending)

    def settle(self, pending: Pending, stored: bytes, large: Verified | None = None) -> None:
        self.pending.pop(pending.ref, None)
        if pending.is_private:
            self.drops.add(pending.codec.tag, pending.ref, stored, pending.since)
        pending.settle(stored, large)

    # what the lines tell us

    async def on_first_dial(self) -> None:
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
            self.sender.give_up_on_old(route, error)

    async def on_back(self) -> None:
        """After a reconnect: subscribe again, send what was not acknowledged, re-read the rest."""
        try:
            for route in list(self._routes.values()):
                await self._resume(route)
            await self._read_again()
        except MillstreamError:
            return  # lost again; the next connection starts over

    async def _resume(self, route: Route) -> None:
        try:
            await self.sender.ready(route)
        except BrokerUnavailableError:
            raise
        except MillstreamError as e:  # we may not listen any more
            self.sender.refuse_unsent(route, e)
        else:
            self.sender.flush(route)

    def on_tick(self) -> None:
        self.drops.flush()
        self.recovery.prune()
        self._patrol.step()

    async def _read_again(self) -> None:
        """Look up all that is pending, oldest first, one script at a time: messages about it may have been lost."""
        by_tag: dict[str, list[bytes]] = {}
        for ref, pending in self.pending.items():
            by_tag.setdefault(pending.codec.tag, []).append(ref)
        for tag, pendings in by_tag.items():
            route = self.route(tag)
            for start in range(0, len(pendings), LOOK_AT_ONCE):
                if refs := self._sent_of(route, pendings[start : start + LOOK_AT_ONCE]):
                    self._all_answered(refs, await self.lines.run(scripts.watch(route.keys, "", "", refs)))


async def _close_with_loop(engine: Engine) -> AsyncGenerator[None, None]:
    """Started once and never resumed: `asyncio.run` closes all such generators at the end of the loop, and so the engine."""
    try:
        yield
    finally:
        engine.close()
        await engine.lines.until_ended()

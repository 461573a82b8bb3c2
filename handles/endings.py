"""Ending requests before they have a result: cancelled by their caller, or past their deadline.

What surely was never sent ends here. Of anything else the server decides, by its record and its clock; where it cannot
be asked, a deadline holds all the same.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.keys import split_ref
from millstream.broker.link import REFUSED
from millstream.broker.scripts import Ended, Forestalled, Waiter
from millstream.broker.states import State
from millstream.broker.supplying import Supplier
from millstream.errors import BrokerUnavailableError, MillstreamError, RequestTimeoutError
from millstream.handles.hub import Hub
from millstream.handles.lines import PATIENCE_S
from millstream.handles.patience import RETRY_S
from millstream.handles.route import Route

CANCELLED = "its caller cancelled it"
AT_ONCE = 100  # refs in one call: the server does nothing else meanwhile
ANSWERS_WITHIN_S = 1.0  # a server that takes longer to say whether a deadline has passed counts as down


class Endings:
    """The ending half of an engine, beside its sending half."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._lines = hub, hub.lines
        self._supplier = Supplier(hub.settings, hub.lines.run)

    # cancelling

    async def cancel(self, ref_id: str) -> bool:
        """Cancel a request; False if it has ended before, or is unknown. Raises BrokerUnavailableError."""
        tag, ref = split_ref(ref_id)
        return bool(await self._cancel(tag, [ref.encode()]))

    def cancel_soon(self, ref_ids: Iterable[str]) -> None:
        """As `cancel`, for who does not wait for it; without a connection for long, the requests just go on."""
        by_tag: dict[str, list[bytes]] = {}
        for ref_id in dict.fromkeys(ref_ids):
            tag, ref = split_ref(ref_id)
            by_tag.setdefault(tag, []).append(ref.encode())
        for tag, refs in by_tag.items():
            self._hub.start(_unless_down(self._cancel, tag, refs))

    async def _cancel(self, tag: str, refs: list[bytes]) -> list[bytes]:
        """Those that this has ended."""
        route = self._hub.route(tag)
        ended: list[bytes] = []
        left: list[bytes] = []
        for ref in refs:
            if self._was_never_sent(ref) and self._hub.take_back(route, ref):
                self._fail(route, ref, outcomes.cancelled(tag, ref, CANCELLED.encode()))
                ended.append(ref)
            else:
                left.append(ref)
        for i in range(0, len(left), AT_ONCE):
            ended += await self._cancel_there(route, left[i : i + AT_ONCE])
        return ended

    async def _cancel_there(self, route: Route, refs: list[bytes]) -> list[bytes]:
        """Have the server end them, over reconnects."""
        give_up, is_repeated = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                await self._lines.link()
                on_their_way = self._hub.on_their_way(
                    route, refs
                )  # before we ask: they may be there when the answer is
                ended, gone = await self._run_cancel(route, refs)
                for ref in gone:
                    if (ref in on_their_way and await self._forestall(route, ref)) or (
                        is_repeated and await self._is_cancelled(route, ref)
                    ):
                        ended.append(ref)
                return ended
            except BrokerUnavailableError:
                if not self._lines.has_been_up or self._lines.is_closed or time.monotonic() > give_up:
                    raise
                is_repeated = True
                await asyncio.sleep(RETRY_S)

    async def _run_cancel(self, route: Route, refs: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Those that were open, and the others."""
        call = scripts.cancel(route.keys, outcomes.ENDED_TTL_S, CANCELLED, refs)
        answers, waiters = await self._lines.run(call)
        await self._supply(route, waiters)
        ended = [ref for ref, (what, _) in zip(refs, answers, strict=True) if what is Ended.ENDED]
        return ended, [ref for ref in refs if ref not in ended]

    async def _forestall(self, route: Route, ref: bytes) -> bool:
        """A request of ours that the server does not know may still reach it: see to it that it ends then."""
        call = scripts.forestall(route.keys, ref.decode(), outcomes.ENDED_TTL_S, CANCELLED)
        match await self._lines.run(call):
            case Forestalled.FORESTALLED:
                self._hub.take_back(route, ref)
                self._fail(route, ref, outcomes.cancelled(route.tag, ref, CANCELLED.encode()))
                return True
            case Forestalled.OPEN:
                ended, _ = await self._run_cancel(route, [ref])
                return bool(ended)
            case _:
                return False

    async def _is_cancelled(self, route: Route, ref: bytes) -> bool:
        """After a lost answer: was it us who ended it? (Or somebody else, just as we would have.)"""
        return await self._lines.run(scripts.place(route.keys, ref.decode())) is State.CANCELLED

    def _was_never_sent(self, ref: bytes) -> bool:
        """Is it ours alone, and has it never been in the air over a connection that was lost?"""
        pending = self._hub.pending.get(ref)
        return pending is not None and self._hub.made(ref) and pending.since > self._hub.drops.sure_after

    # deadlines

    def expire(self, tag: str, refs: list[bytes]) -> None:
        """The time of requests of ours should be up: have the server decide. Without a server, it is up."""
        route = self._hub.route(tag)
        left = []
        for ref in refs:
            if self._hub.take_back(route, ref):
                self._fail(route, ref, outcomes.timed_out(tag, ref, b"the server had not taken it by its deadline"))
            elif self._lines.is_connected:
                left.append(ref)
            else:
                self._fail(route, ref, _unreachable(tag, ref))
        for i in range(0, len(left), AT_ONCE):
            self._hub.start(self._expire_there(route, left[i : i + AT_ONCE]))

    async def _expire_there(self, route: Route, refs: list[bytes]) -> None:
        call = scripts.cancel(route.keys, outcomes.ENDED_TTL_S, outcomes.OVERDUE, refs, overdue=True)
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                answers, waiters = await self._lines.run(call)
        except (TimeoutError, BrokerUnavailableError, *REFUSED):  # their time is up, whatever the server makes of it
            for ref in refs:
                self._fail(route, ref, _unreachable(route.tag, ref))
            return
        for ref, (what, left_ms) in zip(refs, answers, strict=True):
            if what is Ended.EARLY and left_ms >= 0:
                self._hub.deadlines.add(route.tag, ref, left_ms / 1000)
            elif what is Ended.GONE and self._hub.may_be_on_its_way(route, ref):
                self._fail(route, ref, outcomes.timed_out(route.tag, ref, b"it did not reach the server in time"))
        await self._supply(route, waiters)

    # both

    def _fail(self, route: Route, ref: bytes, error: BaseException) -> None:
        self._hub.sender.refused(route, [ref], error)

    async def _supply(self, route: Route, waiters: list[Waiter]) -> None:
        with contextlib.suppress(BrokerUnavailableError):  # any sweeper finds the rest
            await self._supplier.supply_all(route.tag, waiters)


def _unreachable(tag: str, ref: bytes) -> RequestTimeoutError:
    ref_id = f"{tag}~{ref.decode()}"
    return RequestTimeoutError(
        f"request {ref_id} had no result in time, and the server is not reachable; "
        "it is not sent again, but may run if the server had it before",
        ref_id=ref_id,
    )


async def _unless_down(chore: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> None:
    with contextlib.suppress(MillstreamError):
        await chore(*arguments)  # made only here: the loop may end before we begin

"""Sends requests that must wait in the server, in batches: what came in one pass of the loop is held in one call.

The refs they wait for are asked after in the same breath. What does not work out in one go is left to the chores, which
take it step by step and through reconnects; holding twice is as once.
"""

from collections.abc import Callable, Mapping

from millstream.broker import scripts
from millstream.broker.scripts import Held, Submitted
from millstream.broker.supplying import Outcome, Supplier
from millstream.errors import BrokerUnavailableError
from millstream.handles.hub import Hub
from millstream.handles.route import Request, Route

AT_ONCE = 64  # requests, or refs they wait for, per call
MOST_REFS = 100  # of one request; one with more is a call of its own


class Holding:
    """One per engine. `held` is told of what the server has; `stepwise` takes over what did not work out."""

    def __init__(
        self,
        hub: Hub,
        sending: Mapping[bytes, Request],
        held: Callable[[Request], None],
        stepwise: Callable[[Request], None],
        supplier: Supplier,
    ) -> None:
        self._hub, self._sending, self._held, self._stepwise, self._supplier = hub, sending, held, stepwise, supplier
        self._waiting: list[Request] = []

    def send(self, request: Request) -> None:
        """Hold it with what else comes in this pass of the loop."""
        self._hub.unregistered.add(request.pending.ref)
        if not self._waiting:
            self._hub.loop.call_soon(self._flush)
        self._waiting.append(request)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        batches: dict[Route, list[Request]] = {}
        for request in waiting:
            if not self._is_simple(request, batches):
                self._send_all(batches)  # in their order: it may depend on one of them
                self._take_over(request)
                continue
            batch = batches.setdefault(request.route, [])
            batch.append(request)
            if len(batch) == AT_ONCE:
                self._send_all(batches)
        self._send_all(batches)

    def _is_simple(self, request: Request, batches: Mapping[Route, list[Request]]) -> bool:
        """Can it be sent now, behind all that it depends on?"""
        if not request.route.is_ready or len(request.depends_on) > MOST_REFS:
            return False
        if request.is_withdrawn or request.pending.ref not in self._hub.pending:
            return False  # given up: one that it depends on was refused
        for ref_id in (*request.depends_on, *request.mentions):
            tag, _, ref = ref_id.partition("~")
            upstream = self._hub.known_route(tag)
            if upstream is None:
                continue  # of another process
            before = self._sending.get(ref.encode())
            if before is not None and not before.is_in_the_air and not self._is_among(before, batches):
                return False
            if upstream.buffer:
                if not upstream.is_ready:
                    return False
                self._hub.sender.flush(upstream)
            if not self._hub.sender.has_all_sent(upstream):
                return False
        return True

    @staticmethod
    def _is_among(request: Request, batches: Mapping[Route, list[Request]]) -> bool:
        return any(one is request for one in batches.get(request.route, ()))

    def _send_all(self, batches: dict[Route, list[Request]]) -> None:
        for route, batch in batches.items():
            self._send_batch(route, batch)
        batches.clear()

    def _send_batch(self, route: Route, batch: list[Request]) -> None:
        commands = self._hub.lines.commands
        if commands is None or not commands.is_up:
            for request in batch:
                self._take_over(request)
            return
        for request in batch:
            request.is_in_the_air = request.was_submitted = True
        rows = [
            Held(r.pending.ref, r.lane, r.method, r.extras, r.envelope, r.delay_ms, r.due_ms, r.depends_on)
            for r in batch
        ]
        call = scripts.hold_all(route.keys, self._hub.name, rows)
        commands.start(call, lambda reply: self._answered(route, batch, reply))
        pairs: dict[str, list[tuple[str, str]]] = {}
        for request in batch:
            waiter_id = f"{route.tag}~{request.pending.ref.decode()}"
            for ref_id in dict.fromkeys(request.depends_on):
                tag, _, ref = ref_id.partition("~")
                pairs.setdefault(tag, []).append((ref, waiter_id))
        for tag, named in pairs.items():
            asked = scripts.watch_all(self._hub.route(tag).keys, "waiters", named)
            commands.start(asked, lambda reply, tag=tag, named=named: self._watched(tag, named, reply))  # type: ignore[misc]

    def _answered(self, route: Route, batch: list[Request], reply: list[Submitted] | Exception) -> None:
        if isinstance(reply, BrokerUnavailableError):  # they may be held there
            self._hub.drops.may_be_sent_twice(max(request.pending.since for request in batch))
            for request in batch:
                self._take_over(request)
            return
        refs = [request.pending.ref for request in batch]
        self._hub.unregistered.difference_update(refs)
        if isinstance(reply, Exception):
            for request in batch:
                self._held(request)
            self._hub.sender.refused(route, refs, reply)
            return
        for request, answer in zip(batch, reply, strict=True):
            self._held(request)
            if answer is not Submitted.NEW:  # sent twice, perhaps by another engine of ours, which then has the reply
                self._hub.look_at(route, [request.pending.ref], listen=True)

    def _watched(self, tag: str, named: list[tuple[str, str]], reply: list[bytes] | Exception) -> None:
        if isinstance(reply, Exception):
            return  # the link is lost: what is held again asks again; and any sweeper does
        ended = [
            Outcome(f"{tag}~{ref}", waiter_id, stored)
            for (ref, waiter_id), stored in zip(named, reply, strict=True)
            if stored != b"open"
        ]
        if ended:
            self._hub.start(self._hand_on(ended))

    async def _hand_on(self, ended: list[Outcome]) -> None:
        try:
            await self._supplier.hand_on(ended)
        except BrokerUnavailableError:
            return  # any sweeper finds the rest

    def _take_over(self, request: Request) -> None:
        request.is_in_the_air = False
        self._hub.unregistered.discard(request.pending.ref)
        self._stepwise(request)

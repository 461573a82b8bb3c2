"""Sends requests of ours again that a server has lost with its data: it had acknowledged them, and does not know them now.

With `appendfsync everysec`, a host that loses its power takes up to two seconds of them with it. What is large is not
kept for that: it would double the memory of a client.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.errors import BrokerUnavailableError, MillstreamError
from millstream.handles.hub import Hub
from millstream.handles.patience import RETRY_S
from millstream.handles.route import FIELDS, Batch, Pending, Request, Route

MOST_KEPT_BYTES = 64 * 1024 * 1024  # of requests under way; what comes beyond that is not kept
log = logging.getLogger("millstream")


class Recovery:
    """Keeps what was acknowledged as long as somebody waits for its end."""

    def __init__(self, hub: Hub, send: Callable[[Request], None]) -> None:
        self._hub, self._send = hub, send
        self._batches: list[tuple[Route, Batch]] = []  # as they were sent
        self._kept: dict[bytes, tuple[Route, list[Any]] | Request] = {}  # one by one
        self._size_bytes = 0
        self._under_way: set[bytes] = set()

    def keep(self, route: Route, batch: Batch) -> None:
        """The server has these requests now."""
        if self._under_way:
            self._under_way.difference_update(batch.requests[::FIELDS])
        if self._size_bytes < MOST_KEPT_BYTES:
            self._batches.append((route, batch))
            self._size_bytes += batch.envelope_bytes

    def keep_request(self, request: Request) -> None:
        """As `keep`, of one that took more than one step to send."""
        self._under_way.discard(request.pending.ref)
        if request.arguments is None and request.payload is None and self._size_bytes < MOST_KEPT_BYTES:
            self._kept[request.pending.ref] = request
            self._size_bytes += request.size_bytes

    def prune(self) -> None:
        """Forget what has ended. Once per tick, in which a million may wait: so by batches, most of whose requests end at the
        same time, and which is looked into when its last one has."""
        pending, batches = self._hub.pending, self._batches
        self._batches = [one for one in batches if one[1].requests[-FIELDS] in pending]
        if len(self._batches) < len(batches):
            for route, batch in batches:
                if batch.requests[-FIELDS] not in pending and (others := self._still_pending(batch.requests)):
                    self._batches.append((route, Batch(others)))
        if self._kept:
            self._kept = {ref: one for ref, one in self._kept.items() if ref in pending}
        if self._under_way:
            self._under_way.intersection_update(pending)
        kept = (one.size_bytes if isinstance(one, Request) else len(one[1][-1]) for one in self._kept.values())
        self._size_bytes = sum(batch.envelope_bytes for _, batch in self._batches) + sum(kept)

    def _still_pending(self, requests: list[Any]) -> list[Any]:
        pending, still = self._hub.pending, list[Any]()
        for i in range(0, len(requests), FIELDS):
            if requests[i] in pending:
                still += requests[i : i + FIELDS]
        return still

    def _take_apart(self) -> None:
        """The server has lost something: from now on each request for itself."""
        batches, self._batches = self._batches, []
        for route, batch in batches:
            requests = self._still_pending(batch.requests)
            for i in range(0, len(requests), FIELDS):
                self._kept[requests[i]] = (route, requests[i : i + FIELDS])

    def takes(self, pending: Pending) -> bool:
        """The server does not know this request. If it may have lost it, that is looked into, and `pending` waits on."""
        ref = pending.ref
        if ref in self._under_way:
            return True  # the answer to a question of before
        self._take_apart()
        lost = self._kept.pop(ref, None)
        if lost is None:
            return False
        self._under_way.add(ref)
        self._hub.start(self._recover(pending, lost))
        return True

    async def _recover(self, pending: Pending, lost: tuple[Route, list[Any]] | Request) -> None:
        ref, route = pending.ref, lost.route if isinstance(lost, Request) else lost[0]
        try:
            is_lost = await self._was_lost(route, pending)
            if is_lost and isinstance(lost, Request):
                await self._recover_first([*lost.depends_on, *lost.mentions])
        except BrokerUnavailableError:
            self._kept[ref] = lost  # the reconnect asks again
            self._under_way.discard(ref)
            return
        except MillstreamError as e:  # its user may not look, say
            log.warning("whether the server has lost request %s~%s cannot be found out: %s", route.tag, ref.decode(), e)
            is_lost = False
        waiting = self._hub.pending.get(ref)
        if waiting is None:
            self._under_way.discard(ref)
        elif not is_lost:
            self._under_way.discard(ref)
            self._hub.sender.refused(route, [ref], outcomes.not_found(f"{route.tag}~{ref.decode()}"))
        else:
            log.warning("the server has lost request %s~%s: it is sent again", route.tag, ref.decode())
            self._hub.drops.may_be_sent_twice(waiting.since)
            if isinstance(lost, Request):
                self._send(lost.anew(waiting))
            else:
                self._hub.sender.send_again(route, lost[1])

    async def _was_lost(self, route: Route, pending: Pending) -> bool:
        """Has the server begun anew since this request was made? One that has ended is known for `result_ttl_s` at least.

        Of a cluster, nobody could say which server that was: it is not asked.
        """
        if self._hub.settings.is_cluster:
            return False
        commands, age_s = await self._hub.lines.link(), time.monotonic() - pending.since
        ttl_s = await commands.ask("HGET", route.keys.config, "result_ttl_s")
        if ttl_s is None or age_s > float(ttl_s):
            return False
        info = await commands.ask("INFO", "server")
        up_s = next((line for line in info.splitlines() if line.startswith(b"uptime_in_seconds:")), b":inf")
        return float(up_s.partition(b":")[2]) <= age_s + 1  # it counts whole seconds of its clock

    async def _recover_first(self, ref_ids: list[str]) -> None:
        """What a request needs may be lost, too, and must be there again before the request is."""
        for ref_id in ref_ids:
            tag, _, name = ref_id.partition("~")
            ref = name.encode()
            if ref in self._hub.pending and ref not in self._under_way:
                (answer,) = await self._hub.lines.run(scripts.watch(self._hub.route(tag).keys, "", "", [ref]))
                if (waiting := self._hub.pending.get(ref)) is not None:
                    self._hub.answered(waiting, answer)
            while ref in self._under_way:  # noqa: ASYNC110 - rare, and it ends with an answer of the server
                await asyncio.sleep(RETRY_S)

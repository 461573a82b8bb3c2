"""The sweeper everybody runs: due delays, parked requests to repair, replicas whose lease expired. Bounded, idempotent.

Nothing is taken over by lease until this sweeper has watched for a full lease, over an unbroken connection and without a
gap by the server's clock: an outage or a standstill of the server must not look like the death of everyone.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.complaints import Complaints
from millstream.broker.control_scripts import Swept
from millstream.broker.keys import LANES, DeploymentKeys, Keys
from millstream.broker.lease import Lease
from millstream.broker.link import REFUSED
from millstream.broker.outcomes import ENDED_TTL_S, OVERDUE
from millstream.broker.records import ReplicaRecord
from millstream.broker.signed import UNREADABLE, Signer
from millstream.broker.supplying import Run, Supplier
from millstream.config import Settings

# One command, by a link or `execute_command` of a redis-py client. `near`: in a cluster, at the node that has that key.
Ask = Callable[..., Awaitable[Any]]
RunAll = Callable[[Sequence[Call[Swept]]], Awaitable[Sequence[Swept | Exception]]]  # as `run_all` of a connection
AT_ONCE = 50  # deployments that are swept together: 2 ms of the server
log = logging.getLogger("millstream.sweeper")


class Sweeper:
    """One pass over one deployment, or over many; remembers since when its connection has been unbroken."""

    def __init__(
        self,
        settings: Settings,
        run: Run,
        ask: Ask,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._ask = run, ask
        self.lease, self._clock = Lease.of(settings), clock
        self._keys = Keys(settings.namespace)
        self._supplier, self._signer = Supplier(settings, run), Signer(settings)
        self._unbroken_since: float | None = None
        self._looked_ms: float | None = None  # on the server's clock
        self._holds_cursors: dict[str, bytes] = {}
        self._complaints = Complaints(log)

    def connection_was_broken(self) -> None:
        """Take nothing over by lease for a full lease: while we could not look, the living could not renew either."""
        self._unbroken_since = None

    async def step(self, tag: str) -> None:
        """One pass. Raises what redis-py raises when the server is down; the caller then calls `connection_was_broken`.

        What some other program has written there ends this pass, and no other: it is said once.
        """
        with self._about(tag):
            await self._act(tag, await self._run(self._sweep(tag)))

    async def step_all(self, tags: Sequence[str], run_all: RunAll) -> None:
        """As `step`, of each of these: many at a time, since most have nothing to sweep."""
        for first in range(0, len(tags), AT_ONCE):
            some = tags[first : first + AT_ONCE]
            for tag, swept in zip(some, await run_all([self._sweep(tag) for tag in some]), strict=True):
                with self._about(tag):
                    if isinstance(swept, Exception):
                        raise swept
                    await self._act(tag, swept)

    @contextmanager
    def _about(self, tag: str) -> Iterator[None]:
        try:
            yield
        except REFUSED as e:
            self._complaints.about(f"what stands under {{{self._keys.namespace}:{tag}}}", e)
        else:
            self._complaints.well(f"what stands under {{{self._keys.namespace}:{tag}}}")

    def _sweep(self, tag: str) -> Call[Swept]:
        return control_scripts.sweep(self._keys.deployment(tag), self._holds_cursors.get(tag, b"0"))

    async def _act(self, tag: str, swept: Swept) -> None:
        keys = self._keys.deployment(tag)
        self._holds_cursors[tag] = swept.holds_cursor
        self._note_gap(swept.now_ms)
        for ref, missing in swept.stuck:
            for ref_id in missing:
                await self._watch(f"{tag}~{ref.decode(errors='replace')}", ref_id)
        if swept.overdue:
            await self._expire(keys, swept.overdue)
        for key in swept.keep:
            await self._run(scripts.keep([key]))
        for replica in swept.without_lease if self._has_watched_for_a_lease() else ():
            log.warning("replica %s of %s has no lease any more: its requests go to others", replica, tag)
            cause = "its lease expired"
            await bury(self._run, self._ask, self._supplier, self._signer, keys, replica, cause, expired=True)

    async def _watch(self, waiter_id: str, ref_id: str) -> None:
        try:
            await self._supplier.watch(waiter_id, ref_id)
        except ValueError as e:  # it waits for what is no ref id
            self._complaints.about(f"request {waiter_id}", e)

    async def _expire(self, keys: DeploymentKeys, refs: list[bytes]) -> None:
        _, waiters = await self._run(scripts.cancel(keys, ENDED_TTL_S, OVERDUE, refs, overdue=True))
        await self._supplier.supply_all(keys.tag, waiters)

    def _note_gap(self, now_ms: int) -> None:
        """A server that stood still, or a host that slept, has let leases expire that nobody could renew."""
        if self._looked_ms is not None and now_ms - self._looked_ms > self.lease.most_unwatched_s * 1000:
            self.connection_was_broken()
        self._looked_ms = now_ms

    def _has_watched_for_a_lease(self) -> bool:
        if self._unbroken_since is None:
            self._unbroken_since = self._clock()
        return self._clock() - self._unbroken_since >= self.lease.seconds


async def bury(
    run: Run, ask: Ask, supplier: Supplier, signer: Signer, keys: DeploymentKeys, replica: str, cause: str, *,
    expired: bool,
) -> int:  # fmt: skip
    """Release everything a dead replica held and forget it; the number of requests that go on elsewhere.

    Its connections are killed first: one of its reads may still be blocked in the server and would take the very
    entries that are given back. Safe to run twice, and by several at once.
    """
    if expired and await ask("EXISTS", keys.lease(replica)):
        return 0  # it is back: its connections stay
    record = await ask("HGET", keys.replicas, replica)
    for connection in _connections(signer, keys.tag, replica, record) if record else ():
        await ask("CLIENT", "KILL", "ID", connection, near=keys.prefix)
    requeued = 0
    for lane in LANES:
        more = True
        while more:
            released = await run(scripts.release(keys, lane, replica, cause, expired=expired))
            if released.alive:
                return requeued
            more = released.more
            requeued += released.requeued
            await supplier.supply_all(keys.tag, released.waiters)
    await ask("HDEL", keys.replicas, replica)
    await ask("DEL", keys.lease(replica))
    return requeued


def _connections(signer: Signer, tag: str, replica: str, record: bytes) -> list[int]:
    """Of a replica by its record; none if that was written by some other program: it could name anybody's."""
    try:
        return signer.read(ReplicaRecord, record, tag, replica).connections
    except UNREADABLE as e:
        log.error("the record of a dead replica is not read: %s", e)
        return []

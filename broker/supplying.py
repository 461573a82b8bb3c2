"""Giving the outcome of an ended request to the parked requests that wait for it.

Whoever ends a request does this at once (replica, launcher, caller); what a crash in between leaves undone, any
sweeper finds. Every step may run twice.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from millstream.broker import outcomes, remote_errors, scripts
from millstream.broker.codec import Codec, codec_for
from millstream.broker.keys import Keys, split_ref
from millstream.broker.scripts import Waiter
from millstream.config import Settings

Run = Callable[[scripts.Call[Any]], Awaitable[Any]]
FAILED_TTL_S = 3600  # of a request failed by one it depends on; its own deployment's setting is not at hand


class Supplier:
    """Carries outcomes to waiters over any connection that can run scripts."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self._settings, self._run = settings, run
        self._keys = Keys(settings.namespace)

    async def watch(self, waiter_id: str, ref_id: str) -> None:
        """Make a parked request hear of `ref_id`: supply it if that has ended, else be noted there."""
        tag, ref = split_ref(ref_id)
        (answer,) = await self._run(scripts.watch(self._keys.deployment(tag), "waiters", waiter_id, [ref]))
        if answer != b"open":
            await self.supply(ref_id, [waiter_id], answer)

    async def supply(self, ref_id: str, waiter_ids: list[str], stored: bytes | None = None) -> None:
        """Hand the outcome of `ref_id` (read from the server unless given) to its waiters, and failures to theirs."""
        tag, ref = split_ref(ref_id)
        if stored is None:
            (stored,) = await self._run(scripts.watch(self._keys.deployment(tag), "", "", [ref]))
            if stored == b"open":
                return
        todo = [(ref_id, waiter_id, stored) for waiter_id in waiter_ids]
        while todo:
            upstream_id, waiter_id, outcome = todo.pop()
            waiter_tag, waiter = split_ref(waiter_id)
            keys = self._keys.deployment(waiter_tag)
            if outcome[:9] == b"succeeded" and (keep := await self._keep(upstream_id, outcome)) is not None:
                await self._run(scripts.supply(keys, waiter, upstream_id, outcome, keep))
                continue
            if outcome[:9] == b"succeeded":
                outcome = b"unknown"  # its large value has expired
            envelope = self._codec(waiter_tag).seal("error", waiter.encode(), self._error(upstream_id, outcome))
            further = await self._run(scripts.reject(keys, waiter, FAILED_TTL_S, envelope))
            todo += [(waiter_id, again.waiter_id, b"failed - -\n" + envelope) for again in further]

    async def supply_all(self, tag: str, waiters: Iterable[Waiter]) -> None:
        """Hand what has just ended in one deployment to those who wait for it."""
        for waiter in waiters:
            await self.supply(f"{tag}~{waiter.ref.decode()}", [waiter.waiter_id])

    async def _keep(self, ref_id: str, stored: bytes) -> list[str] | None:
        """The keys that a dependant of this value needs beside it, kept for an hour from now; None if they are gone.

        A large value is not copied into the slot of its dependant: it stays in a key of its own, and the dependant's
        `holds` has the sweeper renew that for as long as it is needed.
        """
        part = outcomes.large_part(stored)
        if part is None:
            return []
        tag, ref = split_ref(ref_id)
        key = self._keys.deployment(tag).value(ref, part)
        return [key] if await self._run(scripts.keep([key])) else None

    def _error(self, ref_id: str, outcome: bytes) -> bytes:
        tag, ref = split_ref(ref_id)
        if outcome == b"unknown":
            return remote_errors.capture(outcomes.not_found(ref_id))
        return outcomes.error_body(self._codec(tag), ref.encode(), outcome)

    def _codec(self, tag: str) -> Codec:
        return codec_for(self._settings.secret_key, self._settings.namespace, tag)

"""Giving the outcome of an ended request to the parked requests that wait for it.

Whoever ends a request does this at once (replica, launcher, caller); what a crash in between leaves undone, any
sweeper finds. Every step may run twice.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

from millstream.broker import outcomes, remote_errors, scripts
from millstream.broker.call import Call
from millstream.broker.codec import Codec, codec_for
from millstream.broker.keys import Keys, split_ref
from millstream.broker.scripts import Waiter
from millstream.config import Settings
from millstream.errors import MillstreamError

Run = Callable[[Call[Any]], Awaitable[Any]]
AT_ONCE = 100  # values per call: each is an entry to be added
FAILED_TTL_S = 3600  # of a request failed by one it depends on; its own deployment's setting is not at hand


class Outcome(NamedTuple):
    """How a request has ended (`stored` is what lies under its result key), for one that waits for it."""

    ref_id: str
    waiter_id: str
    stored: bytes


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
        await self.hand_on([Outcome(ref_id, waiter_id, stored) for waiter_id in waiter_ids])

    async def supply_all(
        self, tag: str, waiters: Iterable[Waiter], stored: Mapping[bytes, bytes] | None = None
    ) -> None:
        """Hand what has just ended in one deployment to those who wait for it; `stored` per ref, where it is at hand."""
        if stored is None:
            for waiter in waiters:
                await self.supply(f"{tag}~{waiter.ref.decode()}", [waiter.waiter_id])
        else:
            await self.hand_on([Outcome(f"{tag}~{w.ref.decode()}", w.waiter_id, stored[w.ref]) for w in waiters])

    async def hand_on(self, todo: list[Outcome]) -> None:
        """Hand outcomes to parked requests: values in one call per deployment, failures one by one, and to their waiters."""
        values: dict[str, list[scripts.Value]] = {}
        failed: list[Outcome] = []
        for one in todo:
            if one.stored[:9] != b"succeeded":
                failed.append(one)
                continue
            part = outcomes.large_part(one.stored)
            keep = [] if part is None else await self._keep(one.ref_id, part)
            if keep is not None:
                waiter_tag, waiter = split_ref(one.waiter_id)
                values.setdefault(waiter_tag, []).append(scripts.Value(waiter, one.ref_id, one.stored, keep))
            else:
                failed.append(one)
        for tag, batch in values.items():
            for start in range(0, len(batch), AT_ONCE):
                await self._run(scripts.supply_all(self._keys.deployment(tag), batch[start : start + AT_ONCE]))
        while failed:
            failed += await self._fail(failed.pop())

    async def _fail(self, one: Outcome) -> list[Outcome]:
        """Fail a waiter with the error of what it waits for; what that means for its own waiters."""
        stored = b"unknown" if one.stored[:9] == b"succeeded" else one.stored  # its large value has expired
        tag, waiter = split_ref(one.waiter_id)
        envelope = self._codec(tag).seal("error", waiter.encode(), self._error(one.ref_id, stored))
        call = scripts.reject(self._keys.deployment(tag), waiter, FAILED_TTL_S, envelope)
        further = await self._run(call)
        return [Outcome(one.waiter_id, again.waiter_id, b"failed - -\n" + envelope) for again in further]

    async def _keep(self, ref_id: str, part: str) -> list[str] | None:
        """The keys that a dependant of this large value needs beside it, kept for an hour from now; None if they are gone.

        A large value is not copied into the slot of its dependant: it stays in a key of its own, and the dependant's
        `holds` has the sweeper renew that for as long as it is needed.
        """
        tag, ref = split_ref(ref_id)
        key = self._keys.deployment(tag).value(ref, part)
        return [key] if await self._run(scripts.keep([key])) else None

    def _error(self, ref_id: str, outcome: bytes) -> bytes:
        tag, ref = split_ref(ref_id)
        if outcome == b"unknown":
            return remote_errors.capture(outcomes.not_found(ref_id))
        try:
            return outcomes.error_body(self._codec(tag), ref.encode(), outcome)
        except MillstreamError as e:  # it bears no signature of ours: that is what its dependants fail with
            return remote_errors.capture(e)

    def _codec(self, tag: str) -> Codec:
        return codec_for(self._settings.secret_key, self._settings.namespace, tag)

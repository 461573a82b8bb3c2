"""The claim loop: takes as many requests as there are free slots, and blocks on the server only when there are none."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from millstream.broker import scripts
from millstream.broker.keys import GROUP, LANES, DeploymentKeys
from millstream.broker.link import Link
from millstream.replicas import pace
from millstream.replicas.execution import Executor

# Between two looks at all lanes, a deep one is read directly so many times, and for so long: so long does what is
# returned or urgent wait. Not by a replica that takes few at a time: there the order counts, and a script costs little.
DIRECT_READS, DIRECT_S, DIRECT_FROM = 20, 0.01, 8
FEW, ONE_BY_ONE = 3, 4  # after more idle claims than that, so many are taken one by one
log = logging.getLogger("millstream.replica")


class Intake:
    """Claims over a connection of its own, so that a blocking read delays nothing else."""

    def __init__(
        self,
        keys: DeploymentKeys,
        replica: str,
        executor: Executor,
        max_ongoing: int,
        block_s: float,
        *,
        may_take_ahead: bool = False,
    ) -> None:
        self._keys, self._replica = keys, replica
        self._executor, self._block_ms = executor, int(block_s * 1000)
        self.resize(max_ongoing, may_take_ahead=may_take_ahead)
        self._lane_names = {keys.lane(name).encode(): name for name in LANES}
        self._direct_reads, self._direct_until, self._direct_lane, self._was_direct = 0, 0.0, b"", False
        self._idle_claims = 0  # in a row: they have found nothing
        self.is_draining = False
        self.is_paused = False  # nothing new starts; what has been claimed goes back to its lane
        self._may_start_more = False  # a claim is in the air, or about to be
        self._asked, self._is_backlog = 0, False  # did the last claim bring as many as it asked for?
        self._overdue: asyncio.TimerHandle | None = None  # while something waits here that was taken ahead
        self.on_unreadable: Callable[[str, bytes, str], None] | None = None  # lane, entry, why
        self.on_overdue: Callable[[], None] | None = None  # what was taken ahead has waited too long

    @property
    def free(self) -> int:
        """So many can start now."""
        return 0 if self.is_paused else self._max_ongoing - len(self._executor.running)

    @property
    def _ahead(self) -> int:
        """So many may be taken beyond that: short ones of a backlog, which wait for a thread here and not in the server."""
        return self._executor.pace.ahead if self._may_take_ahead and self._is_backlog and not self.is_paused else 0

    @property
    def is_quiet(self) -> bool:
        """Does nothing run, and is nothing on its way? Then, while paused, that stays so."""
        return not self._may_start_more and not self._executor.running

    def resize(self, max_ongoing: int, *, may_take_ahead: bool) -> None:
        """Other slots from the next claim on; what runs beyond them ends as it would."""
        self._max_ongoing, self._may_take_ahead = max_ongoing, may_take_ahead
        self._executor.slot_freed.set()

    async def run(self, reads: Link, writes: Link) -> None:
        """Claim until draining. Raises BrokerUnavailableError when the connection is lost."""
        self._may_start_more = True
        try:
            await self._run(reads, writes)
        finally:
            self._may_start_more = False

    async def _run(self, reads: Link, writes: Link) -> None:
        claim = self._claim(reads, 0)
        while not self.is_draining:
            if claim is None:
                await self._a_free_slot()
                claim = self._claim(reads, 0)
                continue
            claimed, claim = self._read(await claim), None
            if not claimed and self._was_direct:
                # Not to block now: that brings one request of each lane at once, and the surplus would lose its place.
                self._direct_reads = 0
                claim = self._claim(reads, 0)
                continue
            count = sum(len(entries) for _, entries in claimed)
            self._is_backlog = count >= self._asked
            self._idle_claims = 0 if claimed else self._idle_claims + 1
            if not claimed and self.free > 0 and not self.is_draining:
                claimed = await self._wait(reads, writes)
                count = sum(len(entries) for _, entries in claimed)
            if not self.is_draining:
                claim = self._claim(reads, count)
            self._start(claimed)
        if claim is not None:
            self._start(self._read(await claim))  # taken before we were told to stop

    def _claim(self, reads: Link, about_to_start: int) -> asyncio.Future[Any] | None:
        """Ask for as many as there are free slots; None when there are none."""
        slots, ahead = self._max_ongoing, self._ahead
        # Half of the slots at a time: while one half runs, the claim of the other is in the air.
        count = min((slots + ahead + 1) // 2, self.free + ahead - about_to_start)
        if count <= 0:
            return None
        self._asked = count
        self._was_direct = self._direct_reads > 0 and time.monotonic() < self._direct_until
        if self._was_direct:
            self._direct_reads -= 1
            command = ("XREADGROUP", "GROUP", GROUP, self._replica, "COUNT", count, "STREAMS", self._direct_lane, ">")
            return reads.ask(*command)
        direct_reads = DIRECT_READS if count >= DIRECT_FROM and not ahead else 0
        return reads.run(scripts.claim(self._keys, self._replica, count, direct_reads))

    def _read(self, reply: Any) -> list[Any]:
        """What a claim brought; a script's answer also says whether to go on with direct reads of its lane."""
        claimed: list[Any]
        if not isinstance(reply, tuple):
            claimed = reply or []
            return claimed
        self._direct_reads, claimed = reply
        if self._direct_reads:
            self._direct_lane, self._direct_until = claimed[-1][0], time.monotonic() + DIRECT_S
        return claimed

    async def _a_free_slot(self) -> None:
        self._executor.slot_freed.clear()
        if self.free <= 0 and not self.is_draining:
            self._may_start_more = False
            await self._executor.slot_freed.wait()
            self._may_start_more = True

    async def _wait(self, reads: Link, writes: Link) -> list[Any]:
        """Wait in the server for what comes next.

        Where requests come one by one, the claim after each finds nothing, and costs the server as much as the request:
        then several are taken one by one. After that, or as soon as there is no free slot, a claim sees what else waits.
        """
        claimed = await self._within_slots(await self._block(reads), writes)
        for _ in range(ONE_BY_ONE if self._idle_claims > FEW else 0):
            self._start(claimed)
            self._executor.flush()  # ahead of the next wait: nothing else is to come along with it
            claimed = []
            if self.free <= 0 or self.is_draining:
                break
            claimed = await self._within_slots(await self._block(reads), writes)
        return claimed

    async def _block(self, reads: Link) -> list[Any]:
        """Wait in the server for the next request; up to one per lane may come at once."""
        command = ("XREADGROUP", "GROUP", GROUP, self._replica, "COUNT", 1, "BLOCK", self._block_ms, "STREAMS")
        return await reads.ask(*command, *self._keys.lanes, *[">"] * len(LANES)) or []

    async def _within_slots(self, claimed: list[Any], writes: Link) -> list[Any]:
        """What there is a slot for; the surplus goes back to its own lane, as if it had never left."""
        kept, free = [], self.free
        for lane, entries in claimed:
            if free >= len(entries):
                free -= len(entries)
                kept.append((lane, entries))
            else:
                name = self._lane_names[lane]
                await writes.run(scripts.hand_back(self._keys, name, name, [entry for entry, _ in entries]))
        return kept

    def _start(self, claimed: list[Any]) -> None:
        for lane, entries in claimed:
            name = self._lane_names[lane]
            for entry, fields in entries:
                self._start_one(name, entry, fields)
        if self.free < 0 and self._overdue is None and self._may_take_ahead:
            self._overdue = asyncio.get_running_loop().call_later(pace.STILL_S, self._look_after_ahead)

    def _look_after_ahead(self) -> None:
        """What was taken ahead goes back if what runs takes longer than what ran before."""
        self._overdue = None
        if len(self._executor.running) > self._max_ongoing:
            loop = asyncio.get_running_loop()
            if not self._executor.pace.stands_still(loop.time()):
                self._overdue = loop.call_later(pace.STILL_S, self._look_after_ahead)
            elif self.on_overdue is not None:
                self.on_overdue()

    def _start_one(self, lane: str, entry: bytes, fields: list[bytes]) -> None:
        try:
            self._executor.start_entry(lane, entry, fields)
        except (KeyError, ValueError, TypeError, RecursionError) as e:
            why = f"it has no {e}" if isinstance(e, KeyError) else str(e)
            log.error(
                "entry %s in %s is not a request (%s): some other program wrote it",
                entry.decode(), self._keys.lane(lane), why,
            )  # fmt: skip
            if self.on_unreadable is not None:
                self.on_unreadable(lane, entry, why)

    async def reconcile(self, reads: Link, writes: Link) -> None:
        """After a reconnect: run what the server delivered in a reply that never arrived, as far as there are slots."""
        for lane in self._keys.lanes:
            name = self._lane_names[lane.encode()]
            for _, entries in await reads.ask("XREADGROUP", "GROUP", GROUP, self._replica, "STREAMS", lane, "0") or []:
                unheard_of = [
                    (entry, fields) for entry, fields in entries if fields and not self._executor.holds(name, entry)
                ]
                slots = max(0, self.free)
                for entry, fields in unheard_of[:slots]:
                    log.warning("request %s was delivered in a lost reply: it starts now", entry.decode())
                    self._start_one(name, entry, fields)
                if surplus := [entry for entry, _ in unheard_of[slots:]]:
                    await writes.run(scripts.hand_back(self._keys, name, name, surplus))

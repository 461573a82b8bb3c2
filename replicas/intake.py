"""The claim loop: takes as many requests as there are free slots, and blocks on the server only when there are none."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from millstream.broker import scripts
from millstream.broker.keys import GROUP, LANES, DeploymentKeys
from millstream.broker.link import Link
from millstream.replicas import pace
from millstream.replicas.execution import Executor

T = TypeVar("T")

# Between two looks at all lanes, a deep one is read directly so many times, and for so long: so long does what is
# returned or urgent wait. Not by a replica that takes few at a time: there the order counts, and a script costs little.
DIRECT_READS, DIRECT_S, DIRECT_FROM = 20, 0.01, 8
FEW, ONE_BY_ONE = 3, 4  # after more idle claims than that, so many are taken one by one
TOGETHER = 16  # requests: from so many on, the next claim is worth a system call of its own
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
        self._executor = executor
        self.resize(max_ongoing, may_take_ahead=may_take_ahead)
        self._lane_names = {keys.lane(name).encode(): name for name in LANES}
        self._direct_reads, self._direct_until, self._direct_lane, self._was_direct = 0, 0.0, b"", False
        # Up to one per lane may come at once.
        self._blocking_read = (
            "XREADGROUP", "GROUP", GROUP, replica, "COUNT", 1, "BLOCK", int(block_s * 1000), "STREAMS",
            *keys.lanes, *[">"] * len(LANES),
        )  # fmt: skip
        self._idle_claims = 0  # in a row: they have found nothing
        self._writes: Link | None = None
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
        """So many may be taken beyond that: short ones of a backlog, which wait for a thread or for each other here and not
        in the server."""
        if self.is_paused or not self._is_backlog:
            return 0
        return self._executor.pace.ahead if self._may_take_ahead else self._executor.prompt_pace.ahead

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
        self._may_start_more, self._writes = True, writes
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
            claim = self._start_and_claim(reads, claimed, count)
        if claim is not None:
            self._start(self._read(await claim))  # taken before we were told to stop

    def _start_and_claim(self, reads: Link, claimed: list[Any], count: int) -> asyncio.Future[Any] | None:
        """Start what was claimed, and have the next claim in the air meanwhile; where that is little, its outcomes go out
        together with the claim, which then finds what has come since."""
        if count < TOGETHER:
            return self._start_and_ask(reads, claimed, lambda: None if self.is_draining else self._claim(reads, 0))
        claim = None if self.is_draining else self._claim(reads, count)
        self._start(claimed)
        return claim

    def _start_and_ask(self, reads: Link, claimed: list[Any], ask: Callable[[], T]) -> T:
        """Start what was claimed. Its outcomes go out in one write with what is asked next."""
        reads.hold()
        self._executor.expect_flush()
        try:
            self._start(claimed)
            self._executor.flush(reads)
            return ask()
        finally:
            reads.let_go()

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
        direct_reads = DIRECT_READS if min(count, slots) >= DIRECT_FROM else 0
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
        came = await self._one_by_one(reads, ONE_BY_ONE if self._idle_claims > FEW else 0)
        return await self._within_slots(came or [], writes)

    def _one_by_one(self, reads: Link, left: int) -> asyncio.Future[Any]:
        """Start so many where their replies are read, each outcome sent together with the next read: a caller in a loop
        waits for every step that a task would take. The reply of the last read, with which nothing was done yet."""
        last: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def came(reply: Any) -> None:
            nonlocal left
            if last.done():  # nobody claims any more
                return
            is_one = type(reply) is list and len(reply) == 1 and not self.is_paused
            if not (is_one and left):
                reads.settle(last, reply)
                return
            left -= 1
            self._start_and_ask(reads, reply, go_on)

        def go_on() -> None:
            if self.free > 0 and not self.is_draining:
                self._read_blocking(reads, came)
            else:
                last.set_result([])

        self._read_blocking(reads, came)
        return last

    def _read_blocking(self, reads: Link, came: Callable[[Any], None]) -> None:
        reads.send(came, *self._blocking_read)

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
        if not claimed:
            return
        began, count = time.monotonic(), sum(len(entries) for _, entries in claimed)
        if count > self._max_ongoing - len(self._executor.running) and not self._may_take_ahead:
            self._start_while_free(claimed)
        else:
            for lane, entries in claimed:
                self._start_all(self._lane_names[lane], entries)
        prompt_pace = self._executor.prompt_pace
        if self._executor.running:
            prompt_pace.begin_anew()
        else:
            prompt_pace.ended_together(count, time.monotonic() - began)
        if self.free < 0 and self._overdue is None and self._may_take_ahead:
            self._overdue = asyncio.get_running_loop().call_later(pace.STILL_S, self._look_after_ahead)

    def _start_while_free(self, claimed: list[Any]) -> None:
        """Of what was taken ahead, because all that came before ended at once. What would run beside too many that have not
        ended goes back to its own lane."""
        for lane, entries in claimed:
            name = self._lane_names[lane]
            while entries:
                free = self._max_ongoing - len(self._executor.running)
                if free <= 0:
                    self._hand_back(name, [entry for entry, _ in entries])
                    break
                self._start_all(name, entries[:free])  # each takes one slot at most
                entries = entries[free:]

    def _hand_back(self, lane: str, entries: list[bytes]) -> None:
        if self._writes is not None:
            self._writes.start(scripts.hand_back(self._keys, lane, lane, entries), _ignore)

    def _look_after_ahead(self) -> None:
        """What was taken ahead goes back if what runs takes longer than what ran before."""
        self._overdue = None
        if len(self._executor.running) > self._max_ongoing:
            loop = asyncio.get_running_loop()
            if not self._executor.pace.stands_still(loop.time()):
                self._overdue = loop.call_later(pace.STILL_S, self._look_after_ahead)
            elif self.on_overdue is not None:
                self.on_overdue()

    def _start_all(self, lane: str, entries: list[Any]) -> None:
        start = self._executor.start_entry
        for entry, fields in entries:
            try:
                start(lane, entry, fields)
            except (KeyError, ValueError, TypeError, RecursionError) as e:
                self._report_unreadable(lane, entry, e)

    def _report_unreadable(self, lane: str, entry: bytes, error: Exception) -> None:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
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
                    self._start_all(name, [(entry, fields)])
                if surplus := [entry for entry, _ in unheard_of[slots:]]:
                    await writes.run(scripts.hand_back(self._keys, name, name, surplus))


def _ignore(answer: object) -> None:
    """What could not be handed back is found by the next connection."""

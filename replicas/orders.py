"""What others decide about the requests that run here: cancelled, timed out, taken over, or read so far (streams).

Orders come as messages, which are hints: whoever may publish can send one. A request is given up where the record says
that it is not ours any more, which is looked up when an order comes, and once a second.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.keys import DeploymentKeys
from millstream.broker.supplying import Run, Supplier
from millstream.replicas.execution import Executor
from millstream.replicas.running import Running
from millstream.replicas.streaming import Emitters, Place

LOOK_AFTER_S = 1.0  # what has run no longer has surely been delivered to us
LOOK_AT_ONCE = 500
CLEAN_UP_S = 1.0  # so long a cancelled coroutine may go on, where its caller wants it ended
log = logging.getLogger("millstream.replica")


class Orders:
    """Obeys orders. `recycle(why)` is called when this process should be replaced: a thread cannot be ended, nor a coroutine
    that goes on nevertheless."""

    def __init__(
        self,
        keys: DeploymentKeys,
        executor: Executor,
        emitters: Emitters,
        ask: Callable[..., asyncio.Future[Any]],
        recycle: Callable[[str], None],
    ) -> None:
        self._keys, self._executor, self._emitters, self._ask, self._recycle = keys, executor, emitters, ask, recycle
        self._told: dict[Place, Running] = {}  # that they are not ours any more; not looked up yet

    def on_message(self, message: bytes) -> None:
        """`cancel <lane> <entry>`, `kill <lane> <entry>` or `read <lane> <entry> <count>`."""
        match message.split():
            case [b"read", lane, entry, count] if count.isdigit():
                self._emitters.was_read((lane.decode(errors="replace"), entry), int(count))
            case [b"cancel" | b"kill", lane, entry]:
                self._hear((lane.decode(errors="replace"), entry))
            case _:
                log.error("message %r is no order: some other program sent it", message[:100])

    def _hear(self, place: Place) -> None:
        """What comes together, of many that were cancelled at once, is looked up together."""
        if (running := self._executor.running.get(place)) is None:
            return
        if not self._told:
            asyncio.get_running_loop().call_soon(self._look_up)
        self._told[place] = running

    def _look_up(self) -> None:
        told, self._told = list(self._told.values()), {}
        for batch in batches(told):
            self._places(batch).add_done_callback(partial(self._obey, batch))

    def _obey(self, told: list[Running], places: asyncio.Future[Any]) -> None:
        """Where the record cannot be read, what runs goes on: `check` looks again."""
        if not places.cancelled() and places.exception() is None:
            self._let_go(told, places.result())

    def _places(self, batch: list[Running]) -> asyncio.Future[Any]:
        return self._ask("HMGET", self._keys.open, *[running.attempt.ref for running in batch])

    def _let_go(self, batch: list[Running], places: list[bytes | None]) -> None:
        """Of what is not ours any more: its request is at another place by now, or has ended."""
        for running, place in zip(batch, places, strict=True):
            lane, entry = running.attempt.place
            if place != b"%b %b" % (lane.encode(), entry) and self._executor.running.get((lane, entry)) is running:
                self._take_away(running)

    def _take_away(self, running: Running) -> None:
        is_in_a_thread = self._executor.take_away(*running.attempt.place) is not None
        if b"kill" in running.attempt.more:  # its caller said so; an order might be anybody's
            in_s = 0.0 if is_in_a_thread else CLEAN_UP_S
            asyncio.get_running_loop().call_later(in_s, self._end_with_the_process, running)

    def _end_with_the_process(self, running: Running) -> None:
        if self._executor.running.get(running.attempt.place) is running:
            self._executor.abandon(running)
            self._recycle(f"request {running.request.ref_id} goes on after it was cancelled with kill_on_cancel")

    async def check(self) -> None:
        """Let go of what is not ours any more by the record. Raises BrokerUnavailableError."""
        old = self._executor.running_since(asyncio.get_running_loop().time() - LOOK_AFTER_S)
        for batch in batches(old):
            self._let_go(batch, await self._places(batch))


def batches(running: list[Running]) -> Iterator[list[Running]]:
    for start in range(0, len(running), LOOK_AT_ONCE):
        yield running[start : start + LOOK_AT_ONCE]


async def give_up(run: Run, supplier: Supplier, keys: DeploymentKeys, ref: bytes, why: str) -> None:
    """Cancel a request that nobody waits for any more. Raises BrokerUnavailableError."""
    _, waiters = await run(scripts.cancel(keys, outcomes.ENDED_TTL_S, why, [ref]))
    await supplier.supply_all(keys.tag, waiters)

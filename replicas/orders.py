"""What others decide about the requests that run here: cancelled, timed out, taken over, or read so far (streams).

Orders come as messages, which are hints: once a second the record says which of our requests are still ours.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Ended
from millstream.broker.supplying import Run, Supplier
from millstream.replicas.execution import Executor
from millstream.replicas.streaming import Emitters

LOOK_AFTER_S = 1.0  # what has run no longer has surely been delivered to us
LOOK_AT_ONCE = 500
log = logging.getLogger("millstream.replica")


class Orders:
    """Obeys orders. `recycle(why)` is called when this process should be replaced: a thread cannot be ended."""

    def __init__(
        self, keys: DeploymentKeys, executor: Executor, emitters: Emitters, recycle: Callable[[str], None]
    ) -> None:
        self._keys, self._executor, self._emitters, self._recycle = keys, executor, emitters, recycle

    def on_message(self, message: bytes) -> None:
        """`cancel <lane> <entry>`, `kill <lane> <entry>` or `read <lane> <entry> <count>`."""
        order, lane, entry, *count = message.split()
        if order == b"read":
            self._emitters.was_read((lane.decode(), entry), int(count[0]))
        else:
            self._take_away(lane.decode(), entry, kill=order == b"kill")

    def _take_away(self, lane: str, entry: bytes, *, kill: bool) -> None:
        left = self._executor.take_away(lane, entry)
        if left is not None and kill:
            self._executor.abandon(left)
            self._recycle(f"request {left.request.ref_id} was cancelled with kill_on_cancel while its thread was busy")

    async def check(self, ask: Callable[..., Awaitable[Any]]) -> None:
        """Let go of what is not ours any more by the record. Raises BrokerUnavailableError."""
        old = self._executor.running_since(asyncio.get_running_loop().time() - LOOK_AFTER_S)
        for start in range(0, len(old), LOOK_AT_ONCE):
            batch = old[start : start + LOOK_AT_ONCE]
            places = await ask("HMGET", self._keys.open, *[running.attempt.ref for running in batch])
            for running, place in zip(batch, places, strict=True):
                lane, entry = running.attempt.place
                if place != b"%b %b" % (lane.encode(), entry) and self._executor.running.get((lane, entry)) is running:
                    self._take_away(lane, entry, kill=b"kill" in running.attempt.more)


class ServerClock:
    """The server's time, as of our own clock and what the server said last."""

    def __init__(self) -> None:
        self._ahead_ms = time.time() * 1000 - time.monotonic() * 1000

    def now_ms(self) -> float:
        return time.monotonic() * 1000 + self._ahead_ms

    async def set(self, ask: Callable[..., Awaitable[Any]]) -> None:
        """Ask the server. Half of the round trip is taken off; raises BrokerUnavailableError."""
        before = time.monotonic()
        seconds, micros = await ask("TIME")
        middle_ms = (before + time.monotonic()) * 500
        self._ahead_ms = int(seconds) * 1000 + int(micros) / 1000 - middle_ms


async def give_up(run: Run, supplier: Supplier, keys: DeploymentKeys, ref: bytes, why: str) -> None:
    """Cancel a request that nobody waits for any more. Raises BrokerUnavailableError."""
    _, waiters = await run(scripts.cancel(keys, outcomes.ENDED_TTL_S, why, [ref]))
    await supplier.supply_all(keys.tag, waiters)


async def expire(run: Run, supplier: Supplier, keys: DeploymentKeys, ref: bytes) -> bool:
    """Have the server end a request whose deadline seems to have passed; False if it says that there is time left."""
    call = scripts.cancel(keys, outcomes.ENDED_TTL_S, outcomes.OVERDUE, [ref], overdue=True)
    ((what, _),), waiters = await run(call)
    await supplier.supply_all(keys.tag, waiters)
    return what is not Ended.EARLY

"""What others decide about the requests that run here: cancelled, timed out, taken over, or read so far (streams).

Orders come as messages, which are hints: once a second the record says which of our requests are still ours.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.keys import DeploymentKeys
from millstream.broker.supplying import Run, Supplier
from millstream.replicas.execution import Executor, Running
from millstream.replicas.streaming import Emitters

LOOK_AFTER_S = 1.0  # what has run no longer has surely been delivered to us
LOOK_AT_ONCE = 500
CLEAN_UP_S = 1.0  # so long a cancelled coroutine may go on, where its caller wants it ended
log = logging.getLogger("millstream.replica")


class Orders:
    """Obeys orders. `recycle(why)` is called when this process should be replaced: a thread cannot be ended, nor a coroutine
    that goes on nevertheless."""

    def __init__(
        self, keys: DeploymentKeys, executor: Executor, emitters: Emitters, recycle: Callable[[str], None]
    ) -> None:
        self._keys, self._executor, self._emitters, self._recycle = keys, executor, emitters, recycle

    def on_message(self, message: bytes) -> None:
        """`cancel <lane> <entry>`, `kill <lane> <entry>` or `read <lane> <entry> <count>`."""
        match message.split():
            case [b"read", lane, entry, count] if count.isdigit():
                self._emitters.was_read((lane.decode(errors="replace"), entry), int(count))
            case [b"cancel" | b"kill" as order, lane, entry]:
                self._take_away(lane.decode(errors="replace"), entry, kill=order == b"kill")
            case _:
                log.error("message %r is no order: some other program sent it", message[:100])

    def _take_away(self, lane: str, entry: bytes, *, kill: bool) -> None:
        running = self._executor.running.get((lane, entry))
        is_in_a_thread = self._executor.take_away(lane, entry) is not None
        if running is not None and kill:
            in_s = 0.0 if is_in_a_thread else CLEAN_UP_S
            asyncio.get_running_loop().call_later(in_s, self._end_with_the_process, running)

    def _end_with_the_process(self, running: Running) -> None:
        if self._executor.running.get(running.attempt.place) is running:
            self._executor.abandon(running)
            self._recycle(f"request {running.request.ref_id} goes on after it was cancelled with kill_on_cancel")

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


async def give_up(run: Run, supplier: Supplier, keys: DeploymentKeys, ref: bytes, why: str) -> None:
    """Cancel a request that nobody waits for any more. Raises BrokerUnavailableError."""
    _, waiters = await run(scripts.cancel(keys, outcomes.ENDED_TTL_S, why, [ref]))
    await supplier.supply_all(keys.tag, waiters)

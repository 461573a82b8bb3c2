"""The deadlines of what runs here. The server's clock decides; this asks it when the time should have come.

Whoever sent a request asks, too, and sweepers do: what is here is for requests whose callers are gone or know of no
deadline, because their deployment sets it.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from millstream.broker import outcomes, scripts
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Ended, Waiter
from millstream.broker.supplying import Run, Supplier
from millstream.errors import BrokerUnavailableError

RETRY_S = 0.2  # while the server cannot be asked


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


class Expiry:
    """What ends here is told by an order, as anything else that others decide."""

    def __init__(
        self,
        run: Run,
        supplier: Supplier,
        keys: DeploymentKeys,
        clock: ServerClock,
        start_chore: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._run, self._supplier, self._keys = run, supplier, keys
        self._clock, self._start_chore = clock, start_chore
        self._loop = asyncio.get_running_loop()

    async def has_passed(self, ref: bytes, deadline_ms: int) -> bool:
        """Ahead of the start of a request: if its deadline has passed, end it. Waits for a server that cannot be asked."""
        while self._clock.now_ms() >= deadline_ms:
            try:
                return await self._expire(ref) is None
            except BrokerUnavailableError:
                await asyncio.sleep(RETRY_S)
        return False

    def watch(self, ref: bytes, deadline_ms: int) -> asyncio.TimerHandle:
        """While a request runs: have it ended at its deadline. Cancel the handle when it ends by itself."""
        left_s = (deadline_ms - self._clock.now_ms()) / 1000
        return self._loop.call_later(left_s, lambda: self._start_chore(self._end_in_time(ref)))

    async def _end_in_time(self, ref: bytes) -> None:
        with contextlib.suppress(BrokerUnavailableError):  # any sweeper finds it
            left_s = await self._expire(ref)
            while left_s is not None:
                await asyncio.sleep(left_s)
                left_s = await self._expire(ref)

    async def _expire(self, ref: bytes) -> float | None:
        """Have the server end it; None if it has ended now, else how many seconds it says are left."""
        call = scripts.cancel(self._keys, outcomes.ENDED_TTL_S, outcomes.OVERDUE, [ref], overdue=True)
        ((what, left_ms),), waiters = await self._run(call)
        if waiters:
            self._start_chore(self._supply(waiters))  # not here: the order that follows may cancel us
        return left_ms / 1000 if what is Ended.EARLY and left_ms >= 0 else None

    async def _supply(self, waiters: list[Waiter]) -> None:
        with contextlib.suppress(BrokerUnavailableError):  # any sweeper finds the rest
            await self._supplier.supply_all(self._keys.tag, waiters)

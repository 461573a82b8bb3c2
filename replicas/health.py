"""Asks the user's `check_health` how the object does: once before a replica counts as ready, then every so often."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from millstream.broker.tracebacks import user_traceback
from millstream.config import DeploymentConfig
from millstream.replicas.hooks import Hooks

FAILURES = 3  # in a row (Ray's rule): then the replica is replaced
LOOK_S = 1.0  # how soon another health_check_period_s counts
# The loop may have been busy with the user's code: then the time is up together with the answer, which must not be missed.
LAST_CHANCE_S = 0.05
log = logging.getLogger("millstream.replica")


@dataclass(frozen=True, slots=True)
class Complaint:
    """What was wrong, in words."""

    text: str
    traceback: str = ""


class Health:
    """Three failures in a row, and the launcher is asked for another replica. Nothing runs where there is no check_health."""

    def __init__(self, hooks: Hooks, config: Callable[[], DeploymentConfig], is_paused: Callable[[], bool]) -> None:
        self._hooks, self._config, self._is_paused = hooks, config, is_paused
        self._failures = 0

    async def run(self, say: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        """Check until it has failed too often, and say so to the launcher, which kills us."""
        while self._hooks.has_check_health and self._failures < FAILURES:
            await self._period()
            complaint = await self.step()
            if complaint is not None and self._failures == FAILURES:
                text = f"its check_health failed {FAILURES} times in a row, at last with {complaint.text}"
                await say({"unhealthy": text, "traceback": complaint.traceback})

    async def step(self) -> Complaint | None:
        """One check. While the object is being reconfigured none counts."""
        if self._is_paused():
            return None
        complaint = await check(self._hooks, self._config().health_check_timeout_s)
        if self._is_paused():
            return None
        self._failures = 0 if complaint is None else self._failures + 1
        if complaint is not None:
            log.warning("check_health failed (%d of %d): %s", self._failures, FAILURES, complaint.text)
        return complaint

    async def _period(self) -> None:
        started = time.monotonic()
        while (left_s := started + self._config().health_check_period_s - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left_s, LOOK_S))


async def check(hooks: Hooks, timeout_s: float) -> Complaint | None:
    """Ask once; what is wrong, if anything. Never raises what the user's code does.

    A sync check that hangs keeps its thread; there are at most FAILURES of them, then the process ends.
    """
    asking = asyncio.create_task(_ask(hooks))
    try:
        done, _ = await asyncio.wait([asking], timeout=timeout_s)
        if not done:
            done, _ = await asyncio.wait([asking], timeout=LAST_CHANCE_S)
    finally:
        asking.cancel()
    if not done:
        return Complaint(f"no answer within health_check_timeout_s={timeout_s:g}")
    return Complaint("it was cancelled") if asking.cancelled() else asking.result()


async def _ask(hooks: Hooks) -> Complaint | None:
    try:
        await hooks.check_health()
    except asyncio.CancelledError:
        raise
    except BaseException as e:  # a SystemExit that left a task would end the loop
        return Complaint(f"{type(e).__name__}: {e}", user_traceback(e))
    return None

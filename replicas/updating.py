"""Takes newer configs over while the replica runs. Its launcher says when."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from millstream.broker.records import Current
from millstream.broker.tracebacks import user_traceback
from millstream.config import DeploymentConfig
from millstream.errors import BrokerUnavailableError
from millstream.replicas.execution import Executor
from millstream.replicas.hooks import Hooks
from millstream.replicas.intake import Intake

TO_WAKE_S = 1.0  # an idle replica reads from the server: that takes a moment to end, however little patience there is
NUDGE_S = 0.05  # between two attempts to wake a read: the first one may come before the read has begun
log = logging.getLogger("millstream.replica")


class Updater:
    """The config that a replica works by, and the way to the next one.

    A changed user_config goes to the object's `reconfigure`, under Ray's rule, a writer lock: what runs ends first, and
    what comes waits in its queue. If it does not get quiet within graceful_shutdown_timeout_s, the replica goes on as it
    was and says that it is stuck; its launcher replaces it.

    If `reconfigure` raises, the object gets its former user_config by another call, the replica goes on with that, and
    says that it refused. Where that is impossible (it raises, too, or there was none before), the object may be half of
    one and half of the other: the replica takes nothing more and leaves, and another one starts. No request is lost.
    """

    def __init__(
        self,
        current: Current,
        hooks: Hooks,
        apply: Callable[[Current], Awaitable[None]],
        say: Callable[[dict[str, Any]], Awaitable[None]],
        leave: Callable[[], None],
    ) -> None:
        self.current = self._newest = current
        self._hooks, self._apply, self._say, self._leave = hooks, apply, say, leave
        self._is_told = asyncio.Event()
        self._is_broken = False
        self.is_busy = False

    @property
    def config(self) -> DeploymentConfig:
        return self.current.config

    def tell(self, newest: Current) -> None:
        """There is a newer config. Of several that come while one is being taken over, the last one counts."""
        self._newest = newest
        self._is_told.set()

    async def run(self, intake: Intake, executor: Executor, wake_read: Callable[[], Awaitable[None]]) -> None:
        """Take over what we are told, until draining."""
        while not self._is_broken:
            await self._is_told.wait()
            self._is_told.clear()
            self.is_busy = True
            try:
                if not self._changes_the_object():
                    await self._settle(self._newest)
                elif await self._get_quiet(intake, executor, wake_read):
                    await self._reconfigure(intake)
            finally:
                intake.is_paused = self._is_broken
                executor.slot_freed.set()
                self.is_busy = False
        self._leave()

    def _changes_the_object(self) -> bool:
        return bool(self._newest.config.user_config != self.config.user_config)

    async def _get_quiet(self, intake: Intake, executor: Executor, wake_read: Callable[[], Awaitable[None]]) -> bool:
        """Start nothing more, and wait for the end of what runs. False if that does not end, or if we are draining."""
        intake.is_paused = True
        executor.slot_freed.set()
        try:
            async with asyncio.timeout(max(TO_WAKE_S, self.config.graceful_shutdown_timeout_s)):
                while not intake.is_quiet and not intake.is_draining:
                    executor.slot_freed.clear()
                    with suppress(BrokerUnavailableError):  # then nothing is being read
                        await wake_read()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(executor.slot_freed.wait(), NUDGE_S)
        except TimeoutError:
            # They may even wait for requests that we do not take: going on, and letting another one do it, is the way out.
            log.warning(
                "the new user_config waits for requests that do not end within graceful_shutdown_timeout_s=%g; "
                "this replica goes on without it until another one has taken its place",
                self.config.graceful_shutdown_timeout_s,
            )
            await self._say({"stuck": self._newest.revision})
            return False
        return not intake.is_draining

    async def _reconfigure(self, intake: Intake) -> None:
        newest = self._newest  # by now it may be another one than when we began to wait
        if self._changes_the_object() and (error := await self._hand_over(newest.config.user_config)) is not None:
            has_former = self.config.user_config is not None
            self._is_broken = not has_former or await self._hand_over(self.config.user_config) is not None
            text = f"its reconfigure(user_config) raised {type(error).__name__}: {error}"
            await self._say({"refused": newest.revision, "message": text, "traceback": user_traceback(error)})
            return
        intake.is_paused = False
        await self._settle(newest)

    async def _hand_over(self, user_config: Any) -> BaseException | None:
        """What the object's `reconfigure` raised."""
        try:
            await self._hooks.reconfigure(user_config)
        except BaseException as e:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise  # that is our own end
            return e
        return None

    async def _settle(self, newest: Current) -> None:
        self.current = newest
        await self._apply(newest)
        await self._say({"configured": newest.revision})

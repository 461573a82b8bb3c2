"""A deployment whose method does nothing, its one replica, which can be held, and callers on a loop and without one.

While the replica is held, requests are only submitted. So batches are as full as they can be, on any machine.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from millstream.broker.link import Link
from millstream.handles import engines
from millstream.handles.engine import Engine
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.replicas.intake import Intake
from tests.replica_helpers import Serving

T = TypeVar("T")
LOOK_S = 0.001


class Model:
    async def __call__(self, x: int) -> int:
        return x

    async def suspends(self, x: int) -> int:
        await asyncio.sleep(0)
        return x


class Rig:
    """Callers run on a loop of their own, or in the test's thread; the replica on the loop of `serving`."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.handle: DeploymentHandle[Any] = serving.deploy_only(Model)
        self.sync: SyncHandle[Any] = SyncHandle(self.handle.deployment_name, self.handle.app_name)
        self.unserved: DeploymentHandle[Any] = serving.deploy_only(Model)  # by no replica
        self._replica = serving.start_replica(self.handle, Model).replica
        assert self._replica._intake is not None
        self._intake: Intake = self._replica._intake
        self._waits = False
        self._notice_waits()
        self._callers = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        self._say_hello()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run callers; on a loop that stands still between two of these."""
        return self._callers.run(work)

    @property
    def engine(self) -> Engine:
        """That of the callers' loop."""
        return engines._by_loop[self._callers.get_loop()]

    @property
    def loops(self) -> dict[str, list[asyncio.AbstractEventLoop]]:
        return {"client": [self._callers.get_loop(), engines.background().loop], "replica": [self.serving._loop]}

    def tidy(self, engine: Engine) -> None:
        """On its loop: what an engine does twice a second about requests that have ended."""
        engine.drops.flush()
        engine.recovery.prune()

    # the replica

    def hold(self) -> None:
        """It takes nothing any more, and nothing is on its way to it."""
        self.serving.run(self._hold())

    def release(self) -> None:
        self.serving.run(self._release_when(lambda: True))

    def release_when_sent(self, engine: Engine, count: int) -> None:
        """Let it go on as soon as the server has so many more requests of this engine."""
        asyncio.run_coroutine_threadsafe(self._release_when(self._has_sent(engine, count)), self.serving._loop)

    def until_sent(self, engine: Engine, count: int) -> Coroutine[Any, Any, None]:
        """Return once the server has so many more requests of this engine than now."""
        return _until(self._has_sent(engine, count))

    def _has_sent(self, engine: Engine, count: int) -> Callable[[], bool]:
        wanted, route = engine.sender.sent + count, engine.route(self.handle._tag)
        return lambda: engine.sender.sent >= wanted and not route.buffer and not route.unacknowledged

    async def until_replica_waits(self) -> None:
        """For who runs on the callers' loop: until it asks the server for a request, and none is there."""
        await _until(lambda: self._waits)

    def close(self) -> None:
        self.release()
        self._callers.close()

    def _say_hello(self) -> None:
        """All connections are there after this, and each script was sent with its source."""
        self.sync.call(0)
        assert list(self.sync.map(range(200))) == list(range(200))
        engines.background().run(self.tidy_there())
        self.run(self._say_hello_on_a_loop())

    async def _say_hello_on_a_loop(self) -> None:
        assert [value async for value in self.handle.map(range(200))] == list(range(200))
        await self.unserved.map_refs([0])
        self.tidy(self.engine)

    async def tidy_there(self) -> None:
        self.tidy(engines.background().engine)

    def _notice_waits(self) -> None:
        read_blocking = self._intake._read_blocking

        def noticed(reads: Link, came: Callable[[Any], None]) -> None:
            def came_in(reply: Any) -> None:
                self._waits = False
                came(reply)

            self._waits = True
            read_blocking(reads, came_in)

        self._intake._read_blocking = noticed  # type: ignore[method-assign]

    async def _hold(self) -> None:
        self._intake.is_paused = True
        self._intake._executor.slot_freed.set()
        while not self._intake.is_quiet:
            await self._replica._wake_read()
            await asyncio.sleep(LOOK_S)

    async def _release_when(self, condition: Callable[[], bool]) -> None:
        await _until(condition)
        self._intake.is_paused = False
        self._intake._executor.slot_freed.set()


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it comes true in another thread
        await asyncio.sleep(LOOK_S)

"""The ways to send many requests whose costs are watched. Each waits for all values, and then for what follows a moment later."""

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from millstream.handles import engines
from tests.costs.rig import Rig

MANY = 2000
IN_FLIGHT = 1000  # of a map, by default
CALLERS, ROUNDS = 64, 16
SERIAL = 300


class Workload(NamedTuple):
    name: str
    requests: int
    run: Callable[[Rig], None]


def _map(rig: Rig, in_flight: int = MANY) -> None:
    async def work() -> None:
        values = rig.handle.map(range(MANY), max_in_flight=in_flight)
        assert [value async for value in values] == list(range(MANY))
        rig.tidy(rig.engine)

    rig.release_when_sent(rig.engine, in_flight)
    rig.run(work())


def _refilled_map(rig: Rig) -> None:
    """Where the replica is faster than its callers, batches become small: only for what does not depend on them."""
    _map(rig, IN_FLIGHT)


def _sync_map(rig: Rig) -> None:
    background = engines.background()
    rig.release_when_sent(background.engine, MANY)
    assert list(rig.sync.map(range(MANY), max_in_flight=MANY)) == list(range(MANY))
    background.run(rig.tidy_there())


def _concurrent_calls(rig: Rig) -> None:
    async def call(x: int) -> Any:
        return await rig.handle.call(x)

    async def work() -> None:
        assert await asyncio.gather(*map(call, range(CALLERS))) == list(range(CALLERS))

    for _ in range(ROUNDS):
        rig.hold()
        rig.release_when_sent(rig.engine, CALLERS)
        rig.run(work())
    rig.run(_tidy(rig))


def _serial_calls(rig: Rig) -> None:
    async def work() -> None:
        for x in range(SERIAL):
            await rig.until_replica_waits()
            assert await rig.handle.call(x) == x
        rig.tidy(rig.engine)

    rig.release()
    rig.run(work())


def _map_refs(rig: Rig) -> None:
    async def work() -> None:
        assert len(await rig.unserved.map_refs(range(MANY))) == MANY
        rig.tidy(rig.engine)

    rig.run(work())


async def _tidy(rig: Rig) -> None:
    rig.tidy(rig.engine)


MAP = Workload("async for ... in handle.map(range(2000)), all of them in flight", MANY, _map)
REFILLED_MAP = Workload("async for ... in handle.map(range(2000))", MANY, _refilled_map)
SYNC_MAP = Workload("for ... in sync_handle.map(range(2000)), all of them in flight", MANY, _sync_map)
CONCURRENT_CALLS = Workload("await handle.call(x), by 64 callers", CALLERS * ROUNDS, _concurrent_calls)
SERIAL_CALLS = Workload("await handle.call(x), one after the other", SERIAL, _serial_calls)
MAP_REFS = Workload("await handle.map_refs(range(2000)), without a replica", MANY, _map_refs)

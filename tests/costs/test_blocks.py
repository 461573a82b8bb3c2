"""What one request costs in memory: blocks and bytes while it is under way, and nothing once it has ended."""

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.costs.counting import check
from tests.costs.rig import Rig
from tests.costs.workloads import CONCURRENT_CALLS, IN_FLIGHT, REFILLED_MAP, SERIAL_CALLS, SYNC_MAP, Workload

pytestmark = pytest.mark.single_server

Values = Awaitable[list[Any]]


async def by_map(rig: Rig) -> Values:
    values = rig.handle.map(range(IN_FLIGHT))
    first = asyncio.ensure_future(anext(values))

    async def others() -> list[Any]:
        return [await first] + [value async for value in values]

    return others()


async def by_call(rig: Rig) -> Values:
    return asyncio.gather(*[rig.handle.call(x) for x in range(IN_FLIGHT)])


async def by_map_refs(rig: Rig) -> Values:
    refs = await rig.handle.map_refs(range(IN_FLIGHT))

    async def values() -> list[Any]:
        return [await ref for ref in refs]

    return values()


# In a client, of each request while 1,000 are under way. Behind each bound is what was measured, with Python 3.11.
BOUNDS: dict[Callable[[Rig], Awaitable[Values]], dict[str, float]] = {
    by_map: {"blocks": 8.2, "bytes": 600},  # 6.8 and 500
    by_call: {"blocks": 9.6, "bytes": 740},  # 8.0 and 620
    by_map_refs: {"blocks": 10.8, "bytes": 830},  # 9.0 and 693
}
# Of each request after its end. What a request leaves behind is one block at least; what the interpreter keeps for itself
# does not depend on their number.
LEFT = {
    "blocks": 0.5,
    "bytes": 50,
}  # 0.001 to 0.003 and 1 after a map, 0.10 to 0.24 and 12 to 22 after 300 serial calls


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def memory() -> tuple[int, int]:
    """Blocks and bytes in use."""
    gc.collect()
    return sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("send", BOUNDS, ids=lambda send: send.__name__)
def test_a_request_under_way_holds_no_more_memory(
    rig: Rig, traced: None, send: Callable[[Rig], Awaitable[Values]]
) -> None:
    async def work() -> tuple[int, int]:
        blocks, size_bytes = memory()
        sent = rig.until_sent(rig.engine, IN_FLIGHT)
        values = await send(rig)
        await sent
        rig.tidy(rig.engine)
        blocks_then, size_bytes_then = memory()
        rig.release_when_sent(rig.engine, 0)
        assert await values == list(range(IN_FLIGHT))
        return blocks_then - blocks, size_bytes_then - size_bytes

    rig.hold()
    blocks, size_bytes = rig.run(work())

    check(
        f"what is under way {send.__name__}",
        {"blocks": blocks / IN_FLIGHT, "bytes": size_bytes / IN_FLIGHT},
        BOUNDS[send],
    )


@pytest.mark.parametrize(
    "workload", [REFILLED_MAP, SYNC_MAP, CONCURRENT_CALLS, SERIAL_CALLS], ids=lambda workload: workload.name
)
def test_a_request_that_has_ended_leaves_nothing_behind(rig: Rig, traced: None, workload: Workload) -> None:
    def run() -> tuple[int, int]:
        rig.hold()
        workload.run(rig)
        rig.hold()
        return memory()

    run()
    blocks, size_bytes = run()
    blocks_then, size_bytes_then = run()

    left = {
        "blocks": (blocks_then - blocks) / workload.requests,
        "bytes": (size_bytes_then - size_bytes) / workload.requests,
    }
    check(f"what has ended of {workload.name}", left, LEFT)

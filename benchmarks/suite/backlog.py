"""A deep backlog: what a waiting request takes, and whether it is worked off as fast as a short one."""

import asyncio
import statistics
import time

from benchmarks.peers.measure import run, say
from benchmarks.suite.how import How
from benchmarks.suite.parties import frozen, replicas, wait_until
from benchmarks.suite.served import Clock
from millstream import ObjectRef, serve
from millstream.broker.registry import Registry
from millstream.runtime import with_registry

PARTS = 10
SHALLOW = 1_000
LEAST = 3


def measure(how: How) -> None:
    serve.run(Clock.options(num_replicas=0).bind())
    run(deep(how))
    wait_until(lambda: bool(replicas("Clock")), "there is a replica")
    run(shallow(how, replicas("Clock")))


async def deep(how: How) -> None:
    handle, part = serve.get_deployment_handle("Clock"), max(1, how.backlog // PARTS)
    refs: list[ObjectRef[float]] = []
    times = []
    before = await asyncio.to_thread(memory_of_server)
    for _ in range(PARTS):
        began = time.perf_counter()
        refs += await handle.map_refs(range(part))
        times.append(time.perf_counter() - began)
    say(**{"filling, first": part / times[0], "filling, last": part / times[-1]})
    grown = await asyncio.to_thread(memory_of_server) - before
    say(**{"bytes per waiting request": grown / len(refs)})
    await asyncio.to_thread(scale_to_one)
    ran_at = sorted([await ref for ref in refs])
    say(
        **{
            "worked off": rate(ran_at),
            "worked off, first": rate(ran_at[:part]),
            "worked off, last": rate(ran_at[-part:]),
        }
    )


async def shallow(how: How, replica: list[int]) -> None:
    """The same with a thousand waiting, again and again."""
    handle, rates = serve.get_deployment_handle("Clock"), list[float]()
    over = time.perf_counter() + how.seconds
    while time.perf_counter() < over or len(rates) < LEAST:
        with frozen(replica):
            refs = await handle.map_refs(range(SHALLOW))
        rates.append(rate(sorted([await ref for ref in refs])))
    say(**{"worked off, shallow": statistics.median(rates)})


def rate(ran_at: list[float]) -> float:
    """Per second, from the first that ran to the last: how long the replica took to begin does not count."""
    return (len(ran_at) - 1) / max(ran_at[-1] - ran_at[0], 1e-9)


def memory_of_server() -> float:
    async def read(registry: Registry) -> float:
        return float((await registry.client.info("memory"))["used_memory"])

    return with_registry(read)


def scale_to_one() -> None:
    """As `millstream scale Clock --replicas 1`."""

    async def override(registry: Registry) -> None:
        await registry.override("default.Clock", {"num_replicas": 1})

    with_registry(override)

"""One stream of small items: how many a second, and how long until the first."""

import time

from benchmarks.peers.measure import LEAST, run
from benchmarks.suite.how import How
from benchmarks.suite.parties import replicas, server_pid
from benchmarks.suite.served import NoOp
from benchmarks.suite.timing import say_rate, say_times
from millstream import serve


def measure(how: How) -> None:
    serve.run(NoOp.bind())
    run(streams(how, replicas(), server_pid()))


async def streams(how: How, replica: list[int], server: int) -> None:
    handle = serve.get_deployment_handle("NoOp")

    async def items(values: range) -> None:
        assert [x async for x in handle.count.stream(len(values))] == list(values)

    await say_rate("items", items, how, replica=replica, server=[server])
    say_times("first item", await _until_the_first(handle, how.seconds))


async def _until_the_first(handle: serve.DeploymentHandle, seconds: float) -> list[float]:
    times: list[float] = []
    over = time.perf_counter() + seconds
    while (began := time.perf_counter()) < over or len(times) < LEAST:
        stream = handle.count.stream(2)
        assert await anext(stream) == 0
        times.append(time.perf_counter() - began)
        assert [x async for x in stream] == [1]
    return times

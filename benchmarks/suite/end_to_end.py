"""End to end: requests submitted together, until all results are there."""

from benchmarks.peers.measure import run
from benchmarks.suite.floor import Floor, all_within, floor
from benchmarks.suite.how import How
from benchmarks.suite.parties import replicas, server_pid
from benchmarks.suite.served import NoOp
from benchmarks.suite.timing import say_rate, say_rate_blocking
from millstream import serve


def measure(how: How) -> None:
    serve.run(NoOp.bind())
    run(ours(how, replicas(), server_pid()))
    handle = serve.get_deployment_handle("NoOp", sync=True)

    def everything(values: range) -> None:
        assert list(handle.map(values)) == list(values)

    say_rate_blocking("sync map", everything, how, replica=replicas(), server=[server_pid()])
    with floor(how.aof) as beside:
        run(floors(how, beside))


async def ours(how: How, replica: list[int], server: int) -> None:
    handle = serve.get_deployment_handle("NoOp")

    async def everything(values: range) -> None:
        assert [value async for value in handle.map(values)] == list(values)

    await say_rate("map", everything, how, replica=replica, server=[server])


async def floors(how: How, beside: Floor) -> None:
    client = await beside.connect()
    pids = {"replica": [beside.worker_pid], "server": [beside.server_pid]}

    async def bounded(values: range) -> None:
        assert await all_within(client, values) == list(values)

    async def unbounded(values: range) -> None:
        assert await client.all(values) == list(values)

    await say_rate("floor map", bounded, how, **pids)
    await say_rate("floor all", unbounded, how, **pids)

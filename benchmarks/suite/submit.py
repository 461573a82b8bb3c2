"""Bulk submit: requests that the server has, while nobody takes any."""

from benchmarks.floor.client import Client
from benchmarks.peers.measure import run
from benchmarks.suite.floor import Floor, floor
from benchmarks.suite.how import How
from benchmarks.suite.parties import frozen, replicas, server_pid
from benchmarks.suite.served import NoOp
from benchmarks.suite.timing import say_rate
from millstream import serve


def measure(how: How) -> None:
    serve.run(NoOp.bind())
    with frozen(replicas()):
        run(ours(how, server_pid()))
    with floor(how.aof) as beside:
        run(floors(how, beside))


async def ours(how: How, server: int) -> None:
    handle, refs = serve.get_deployment_handle("NoOp"), []

    async def submit(values: range) -> None:
        refs.append(await handle.map_refs(values))  # kept: to drop them is work, too

    await say_rate("submit", submit, how, server=[server])


async def floors(how: How, beside: Floor) -> None:
    client: Client = await beside.connect()
    with frozen([beside.worker_pid]):
        await say_rate("floor submit", client.submit, how, server=[beside.server_pid])

"""The round trip: one call at a time."""

from typing import Any

from benchmarks.peers.measure import run, serial_times, serial_times_blocking
from benchmarks.suite.floor import Floor, floor
from benchmarks.suite.how import How
from benchmarks.suite.served import NoOp
from benchmarks.suite.timing import say_times
from millstream import serve


def measure(how: How) -> None:
    serve.run(NoOp.bind())
    run(ours(how))
    call = serve.get_deployment_handle("NoOp", sync=True).call
    assert call(1) == 1
    say_times("sync call", serial_times_blocking(call, how.seconds))
    with floor(how.aof) as beside:
        run(floors(how, beside))


async def ours(how: How) -> None:
    handle = serve.get_deployment_handle("NoOp")
    assert await handle.call(1) == 1

    async def ref_first(x: Any) -> Any:
        return await (await handle.remote(x))

    say_times("call", await serial_times(handle.call, how.seconds))
    say_times("remote", await serial_times(ref_first, how.seconds))


async def floors(how: How, beside: Floor) -> None:
    client = await beside.connect()
    say_times("floor call", await serial_times(client.call, how.seconds))

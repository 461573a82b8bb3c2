"""Callers at the same time, each waiting for its result before its next call."""

from benchmarks.peers.measure import callers_rate, run, say
from benchmarks.suite.floor import Floor, floor
from benchmarks.suite.how import How
from benchmarks.suite.served import NoOp
from millstream import serve

NUMBERS = (1, 64, 1_000)


def measure(how: How) -> None:
    serve.run(NoOp.bind())
    run(ours(how))
    with floor(how.aof) as beside:
        run(floors(how, beside))


async def ours(how: How) -> None:
    handle = serve.get_deployment_handle("NoOp")
    assert await handle.call(1) == 1
    for number in NUMBERS:
        say(**{f"{number} callers": await callers_rate(handle.call, 1, number, how.seconds)})


async def floors(how: How, beside: Floor) -> None:
    client = await beside.connect()
    for number in NUMBERS:
        say(**{f"floor {number} callers": await callers_rate(client.call, 1, number, how.seconds)})

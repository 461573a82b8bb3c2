"""Methods that block, in threads of the replica."""

from benchmarks.peers.measure import run, serial_times
from benchmarks.suite.how import How
from benchmarks.suite.parties import replicas, server_pid
from benchmarks.suite.served import Blocking
from benchmarks.suite.timing import say_rate, say_times
from millstream import serve


def measure(how: How) -> None:
    serve.run(Blocking.bind())
    run(calls(how, replicas("Blocking"), server_pid()))


async def calls(how: How, replica: list[int], server: int) -> None:
    handle = serve.get_deployment_handle("Blocking")

    async def everything(values: range) -> None:
        assert [value async for value in handle.map(values)] == list(values)

    await say_rate("threads", everything, how, replica=replica, server=[server])
    say_times("threads call", await serial_times(handle.call, how.seconds))

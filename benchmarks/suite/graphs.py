"""Requests that take the results of others: a chain of three deployments, and ten refs into one call."""

from typing import Any

from benchmarks.peers.measure import CALLERS, callers_rate, run, say, serial_times
from benchmarks.suite.how import How
from benchmarks.suite.served import NoOp
from benchmarks.suite.timing import say_times
from millstream import serve

FAN = 10


def measure(how: How) -> None:
    a, b = NoOp.options(name="A").bind(), NoOp.options(name="B").bind()
    serve.run(NoOp.options(name="C").bind(a, b))
    run(graphs(how))


async def graphs(how: How) -> None:
    a, b, c = (serve.get_deployment_handle(name) for name in "ABC")

    async def chain(x: Any) -> Any:
        return await (await c.remote(b.remote(a.remote(x))))

    async def fan_in(x: Any) -> Any:
        return await (await c.remote(*[a.remote(x) for _ in range(FAN)]))

    for name, graph in (("chain", chain), ("fan-in", fan_in)):
        assert await graph(1) == 1
        say(**{name: await callers_rate(graph, 1, CALLERS, how.seconds)})
        say_times(f"{name} alone", await serial_times(graph, how.seconds))

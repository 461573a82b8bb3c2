"""Taskiq on uvloop: the list broker of taskiq-redis, its fastest; results in Redis, polled for each ms instead of each 200.

See taskiq-python.github.io (available-components/brokers, guide/cli: --max-async-tasks). It has no bulk verb: 64 submits
at once.
"""

from collections.abc import Iterable
from typing import Any

from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

from benchmarks.peers.measure import PATIENCE_S, URL, at_once, measure, run

broker = ListQueueBroker(URL).with_result_backend(RedisAsyncResultBackend(URL, result_ex_time=600))


async def echo(value: Any) -> Any:
    return value


task = broker.task(task_name="echo")(echo)


async def value_of(sent: Any) -> Any:
    return (await sent.wait_result(check_interval=0.001, timeout=PATIENCE_S)).return_value


class Peer:
    async def call(self, value: Any) -> Any:
        return await value_of(await task.kiq(value))

    async def all(self, values: Iterable[Any]) -> list[Any]:
        return await at_once(value_of, await at_once(task.kiq, values))

    async def submit(self, values: Iterable[Any]) -> None:
        await at_once(task.kiq, values)


async def main() -> None:
    await broker.startup()
    await measure(Peer())
    await broker.shutdown()


if __name__ == "__main__":
    run(main())

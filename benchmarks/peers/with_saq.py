"""SAQ on uvloop with hiredis: concurrency 500, `map` and `apply` with a short interval, since they poll (0.5 s by default).

See saq-py.readthedocs.io (Queue.map, Queue.apply, Worker). No timers are changed. It has no bulk verb: 64 submits at once.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import uvloop
from redis.asyncio import Redis
from saq.queue.redis import RedisQueue

from benchmarks.peers.measure import PATIENCE_S, URL, at_once, measure, run

asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
queue = RedisQueue(Redis.from_url(URL, max_connections=1000), max_concurrent_ops=64)  # 100 of them are not enough


async def echo(_: Any, *, value: Any) -> Any:
    return value


settings = {"queue": queue, "functions": [("echo", echo)], "concurrency": 500}


class Peer:
    async def call(self, value: Any) -> Any:
        return await queue.apply("echo", value=value, poll_interval=0.001, timeout=PATIENCE_S)

    async def all(self, values: Iterable[Any]) -> list[Any]:
        arguments = [{"value": value} for value in values]
        results: list[Any] = await queue.map("echo", arguments, poll_interval=0.02, timeout=PATIENCE_S)
        return results

    async def submit(self, values: Iterable[Any]) -> None:
        await at_once(lambda value: queue.enqueue("echo", value=value), values)


async def main() -> None:
    await measure(Peer())
    await queue.disconnect()


if __name__ == "__main__":
    run(main())

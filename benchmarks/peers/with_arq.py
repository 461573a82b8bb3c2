"""arq on uvloop, with the settings of its worker and `Job.result` that poll the server: a poll each 1 to 10 ms.

Both poll each 500 ms by default (arq-docs.helpmanual.io, reference of `Worker` and `Job`). It has no bulk verb: 64
submits at once.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import uvloop
from arq import create_pool
from arq.connections import ArqRedis, RedisSettings

from benchmarks.peers.measure import PATIENCE_S, URL, at_once, measure, run

asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


async def echo(_: Any, value: Any) -> Any:
    return value


class WorkerSettings:
    functions = (echo,)
    redis_settings = RedisSettings.from_dsn(URL)
    max_jobs = 500
    poll_delay = 0.01


class Peer:
    def __init__(self, pool: ArqRedis) -> None:
        self._pool = pool

    async def _enqueue(self, value: Any) -> Any:
        return await self._pool.enqueue_job("echo", value)

    async def _value_of(self, job: Any) -> Any:
        return await job.result(timeout=PATIENCE_S, poll_delay=0.001)

    async def call(self, value: Any) -> Any:
        return await self._value_of(await self._enqueue(value))

    async def all(self, values: Iterable[Any]) -> list[Any]:
        return await at_once(self._value_of, await at_once(self._enqueue, values))

    async def submit(self, values: Iterable[Any]) -> None:
        await at_once(self._enqueue, values)


async def main() -> None:
    await measure(Peer(await create_pool(WorkerSettings.redis_settings)))


if __name__ == "__main__":
    run(main())

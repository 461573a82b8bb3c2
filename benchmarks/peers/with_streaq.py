"""streaQ on uvloop: concurrency 500, `enqueue_many`; a result is waited for over a pub/sub connection of its own.

See streaq.readthedocs.io (Worker, performance, enqueue_many).
"""

from collections.abc import Iterable
from typing import Any

from streaq import Worker

from benchmarks.peers.measure import PATIENCE_S, URL, at_once, measure, run

worker: Any = Worker(
    redis_url=URL,
    redis_kwargs={
        "max_connections": 1000
    },  # each wait takes one, and another: 64 waits use up what there is by default
    queue_name="peers",
    concurrency=500,
    anyio_kwargs={"use_uvloop": True},
)


async def echo(value: Any) -> Any:
    return value


task = worker.task(name="echo")(echo)


async def value_of(job: Any) -> Any:
    return (await job.result(timeout=int(PATIENCE_S))).result


class Peer:
    async def call(self, value: Any) -> Any:
        return await value_of(await task.enqueue(value))

    async def all(self, values: Iterable[Any]) -> list[Any]:
        jobs = [task.enqueue(value) for value in values]
        await worker.enqueue_many(jobs)
        return await at_once(value_of, jobs)

    async def submit(self, values: Iterable[Any]) -> None:
        await worker.enqueue_many([task.enqueue(value) for value in values])


async def main() -> None:
    async with worker:
        await measure(Peer())


if __name__ == "__main__":
    run(main())

"""ArdiQ: `enqueue_many` and `result(timeout=...)`, which waits in its Rust core; concurrency as prefetch allows.

Its performance guide (ardiq.bytay.dev/guides/performance) has submitters stage in batches.
"""

from collections.abc import Iterable
from typing import Any

from ardiq import Ardiq

from benchmarks.peers.measure import PATIENCE_S, URL, at_once, measure, run

app = Ardiq(redis_url=URL, queue_name="peers", concurrency=500)


async def echo(value: Any) -> Any:
    return value


task = app.task(name="echo")(echo)


async def value_of(job: Any) -> Any:
    return (await job.result(timeout=PATIENCE_S)).value


class Peer:
    async def call(self, value: Any) -> Any:
        return await value_of(await task.enqueue(value))

    async def all(self, values: Iterable[Any]) -> list[Any]:
        return await at_once(value_of, await app.enqueue_many([task.prepare(value) for value in values]))

    async def submit(self, values: Iterable[Any]) -> None:
        await app.enqueue_many([task.prepare(value) for value in values])


async def main() -> None:
    await measure(Peer())


if __name__ == "__main__":
    run(main())

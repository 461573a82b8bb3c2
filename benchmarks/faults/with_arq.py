"""arq, two processes; a job is held for its timeout and 10 s more before another worker may have it."""

import asyncio
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings

from benchmarks.faults.ledger import TIMEOUT_S, URL, note, send_all


async def work(_: Any, name: str, seconds: float) -> None:
    note("start", name)
    await asyncio.sleep(seconds)
    note("end", name)


class WorkerSettings:
    functions = (work,)
    redis_settings = RedisSettings.from_dsn(URL or "redis://127.0.0.1")
    max_jobs = 4
    job_timeout = TIMEOUT_S


if __name__ == "__main__":
    with asyncio.Runner() as runner:
        pool = runner.run(create_pool(WorkerSettings.redis_settings))
        send_all(lambda name, seconds: runner.run(pool.enqueue_job("work", name, seconds)))

"""Taskiq with the stream broker of taskiq-redis, which acknowledges; its lock is given an end."""

import asyncio

from taskiq_redis import RedisStreamBroker

from benchmarks.faults.ledger import TIMEOUT_S, URL, note, send_all

broker = RedisStreamBroker(URL, idle_timeout=TIMEOUT_S * 1000, unacknowledged_lock_timeout=TIMEOUT_S)


async def work(name: str, seconds: float) -> None:
    note("start", name)
    await asyncio.sleep(seconds)
    note("end", name)


task = broker.task(task_name="work")(work)

if __name__ == "__main__":
    with asyncio.Runner() as runner:
        runner.run(broker.startup())
        send_all(lambda name, seconds: runner.run(task.kiq(name, seconds)))

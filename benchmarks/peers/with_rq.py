"""RQ: `SimpleWorker`, which forks no process for each job, and `enqueue_many`; results come over a blocking stream read.

See python-rq.org/docs/workers (performance notes), /docs (bulk enqueueing) and /docs/results.
"""

from collections.abc import Iterable
from typing import Any

from redis import Redis
from rq import Queue

from benchmarks.peers.jobs import echo
from benchmarks.peers.measure import PATIENCE_S, URL, measure_blocking


def value_of(job: Any) -> Any:
    return job.latest_result(timeout=int(PATIENCE_S)).return_value


class Peer:
    def __init__(self) -> None:
        self._queue = Queue(connection=Redis.from_url(URL))

    def call(self, value: Any) -> Any:
        return value_of(self._queue.enqueue(echo, value))

    def all(self, values: Iterable[Any]) -> list[Any]:
        return [value_of(job) for job in self._enqueue_many(values)]

    def submit(self, values: Iterable[Any]) -> None:
        self._enqueue_many(values)

    def _enqueue_many(self, values: Iterable[Any]) -> list[Any]:
        jobs: list[Any] = self._queue.enqueue_many([Queue.prepare_data(echo, (value,)) for value in values])
        return jobs


if __name__ == "__main__":
    measure_blocking(Peer())

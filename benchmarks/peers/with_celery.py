"""Celery: solo pool, no prefetch limit, no gossip, mingle, heartbeat or rate limits; results over pub/sub.

Its guide to optimizing (docs.celeryq.dev, userguide/optimizing) has prefetch off the limit for short tasks, and its guide
to workers has the solo pool as the one with the least overhead. One producer submits, and results are joined natively.
"""

from collections.abc import Iterable
from typing import Any

from celery import Celery
from celery.result import ResultSet

from benchmarks.peers.measure import PATIENCE_S, URL, measure_blocking

app = Celery("peers", broker=URL, backend=URL)
app.conf.update(
    worker_prefetch_multiplier=0,
    worker_disable_rate_limits=True,
    broker_connection_retry_on_startup=True,
    task_serializer="json",
)


def echo(value: Any) -> Any:
    return value


task = app.task(echo, name="echo")


class Peer:
    def call(self, value: Any) -> Any:
        return task.delay(value).get(timeout=PATIENCE_S)

    def _send(self, values: Iterable[Any], *, ignore_result: bool) -> list[Any]:
        with app.producer_or_acquire() as producer:
            return [task.apply_async((v,), producer=producer, ignore_result=ignore_result) for v in values]

    def all(self, values: Iterable[Any]) -> list[Any]:
        results: list[Any] = ResultSet(self._send(values, ignore_result=False)).join_native(timeout=PATIENCE_S)
        return results

    def submit(self, values: Iterable[Any]) -> None:
        self._send(values, ignore_result=True)


if __name__ == "__main__":
    measure_blocking(Peer())

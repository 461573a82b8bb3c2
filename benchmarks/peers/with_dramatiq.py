"""Dramatiq: one process of eight threads (its default), hiredis, results in Redis, which are waited for with a blocking pop.

Its reference (dramatiq.io/reference.html, Results and RedisBroker) has no bulk verb: messages are enqueued one by one.
"""

from collections.abc import Iterable
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.peers.measure import PATIENCE_S, URL, measure_blocking

broker = RedisBroker(url=URL)
broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)


def echo(value: Any) -> Any:
    return value


actor = dramatiq.actor(echo, actor_name="echo", store_results=True)


def value_of(message: Any) -> Any:
    return message.get_result(block=True, timeout=int(PATIENCE_S * 1000))


class Peer:
    def call(self, value: Any) -> Any:
        return value_of(actor.send(value))

    def all(self, values: Iterable[Any]) -> list[Any]:
        return [value_of(message) for message in [actor.send(value) for value in values]]

    def submit(self, values: Iterable[Any]) -> None:
        for value in values:
            actor.send(value)


if __name__ == "__main__":
    measure_blocking(Peer())

"""huey: eight threads, blocking pop, and results that wake who waits (`notify_result`), as its guide to storage has it.

See huey.readthedocs.io: consumer (thread workers for what does not compute) and api (RedisStorage). It has no bulk verb.
"""

from collections.abc import Iterable
from typing import Any

from huey import RedisHuey

from benchmarks.peers.jobs import echo
from benchmarks.peers.measure import PATIENCE_S, URL, measure_blocking

huey = RedisHuey("peers", url=URL, notify_result=True)
task = huey.task()(echo)


def value_of(result: Any) -> Any:
    return result.get(blocking=True, timeout=PATIENCE_S)


class Peer:
    def call(self, value: Any) -> Any:
        return value_of(task(value))

    def all(self, values: Iterable[Any]) -> list[Any]:
        return [value_of(result) for result in [task(value) for value in values]]

    def submit(self, values: Iterable[Any]) -> None:
        for value in values:
            task(value)


if __name__ == "__main__":
    measure_blocking(Peer())

"""tarsk: one child of 100 slots (its default), results kept, and polled for each ms instead of each 50.

See rahmadafandi.github.io/tarsk (tasks: `send` beside `send_async`, `get(poll=...)`): on a server this near its blocking
verbs, whose round trip is in Rust, are the faster ones. It has no bulk verb.
"""

from collections.abc import Iterable
from typing import Any

from tarsk import App

from benchmarks.peers.measure import PATIENCE_S, URL, measure_blocking

app = App(broker=URL)


async def echo(value: Any) -> Any:
    return value


task = app.task(name="echo", result_ttl=600)(echo)


def value_of(task_id: str) -> Any:
    return app.result(task_id).get(timeout=PATIENCE_S, poll=0.001)


class Peer:
    def call(self, value: Any) -> Any:
        return value_of(task.send(value))

    def all(self, values: Iterable[Any]) -> list[Any]:
        return [value_of(task_id) for task_id in [task.send(value) for value in values]]

    def submit(self, values: Iterable[Any]) -> None:
        for value in values:
            task.send(value)


if __name__ == "__main__":
    measure_blocking(Peer())

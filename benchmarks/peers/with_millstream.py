"""millstream, one replica, all settings as they come. `submit`: `map_refs`, which returns when the server has all."""

import time
from collections.abc import Iterable
from typing import Any

from benchmarks.peers.measure import PATIENCE_S, measure, measure_serial_blocking, run
from millstream import ObjectRef, serve


@serve.deployment
class Echo:
    async def __call__(self, value: Any) -> Any:
        return value


app = Echo.bind()


class Peer:
    def __init__(self) -> None:
        self._handle = serve.get_deployment_handle("Echo")
        self._refs: list[ObjectRef[Any]] = []  # kept: who wants no result uses another verb, or frees it later
        self.call = self._handle.call

    async def all(self, values: Iterable[Any]) -> list[Any]:
        return [value async for value in self._handle.map(values)]

    async def submit(self, values: Iterable[Any]) -> None:
        self._refs += await self._handle.map_refs(values)


async def main() -> None:
    await measure(Peer())


def wait_for_replica() -> None:
    """The client may be there before `millstream run` has deployed."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        application = serve.status().applications.get("default")
        if application and (echo := application.deployments.get("Echo")) and echo.replicas:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    wait_for_replica()
    measure_serial_blocking(serve.get_deployment_handle("Echo", sync=True).call)
    run(main())

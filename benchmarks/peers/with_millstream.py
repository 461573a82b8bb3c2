"""millstream, one replica, all settings as they come. `submit`: nothing sends in bulk; `remote` in a loop, refs awaited."""

import asyncio
from collections.abc import Iterable
from typing import Any

from benchmarks.peers.measure import measure, measure_serial_blocking, run
from millstream import serve


@serve.deployment
class Echo:
    async def __call__(self, value: Any) -> Any:
        return value


app = Echo.bind()


class Peer:
    def __init__(self) -> None:
        self._handle = serve.get_deployment_handle("Echo")
        self._queued = self._handle.options(block_until="queued")
        self.call = self._handle.call

    async def all(self, values: Iterable[Any]) -> list[Any]:
        return [value async for value in self._handle.map(values)]

    async def submit(self, values: Iterable[Any]) -> None:
        await asyncio.gather(*[self._queued.remote(value) for value in values])


async def main() -> None:
    await measure(Peer())


if __name__ == "__main__":
    measure_serial_blocking(serve.get_deployment_handle("Echo", sync=True).call)
    run(main())

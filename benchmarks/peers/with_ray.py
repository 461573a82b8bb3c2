"""Ray Serve, one replica, no proxy, the settings that its guide to performance tuning has for throughput.

See docs.ray.io/en/latest/serve/advanced-guides/performance.html (RAY_SERVE_THROUGHPUT_OPTIMIZED). It needs no Redis: its
requests are in the memory of the caller, so there is nothing to submit to. The worker is all of its processes together.
"""

import os
from collections.abc import Iterable
from typing import Any

os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray import serve

from benchmarks.peers.measure import at_once, measure, measure_serial_blocking, run


class Echo:
    async def __call__(self, value: Any) -> Any:
        return value


class Peer:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def call(self, value: Any) -> Any:
        return await self._handle.remote(value)

    async def all(self, values: Iterable[Any]) -> list[Any]:
        return await at_once(self.call, values)


async def main(handle: Any) -> None:
    await measure(Peer(handle))


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})(Echo)
    served = serve.run(deployment.bind(), route_prefix=None)
    blocking = serve.get_app_handle("default")
    blocking._init(_run_router_in_separate_loop=True)  # what the setting turns off: `result` blocks
    measure_serial_blocking(lambda value: blocking.remote(value).result())
    run(main(served))
    ray.shutdown()

"""From zero: a call to a deployment whose application is deployed and that has no replica, until its result is there."""

import statistics
import time

from benchmarks.peers.measure import say
from benchmarks.suite.how import How
from benchmarks.suite.parties import wait_until
from benchmarks.suite.served import NoOp
from millstream import serve

AT_ZERO = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 0.1}
LEAST, MOST = 3, 50


def measure(how: How) -> None:
    handle = serve.run(NoOp.options(autoscaling_config=AT_ZERO).bind())
    first, *others = starts(handle, how.seconds)
    say(
        **{
            "very first start": first * 1e3,
            "start": statistics.median(others) * 1e3,
            "start, slowest": max(others) * 1e3,
        }
    )


def starts(handle: serve.SyncHandle, seconds: float) -> list[float]:
    times: list[float] = []
    over = time.perf_counter() + 5 * seconds  # most of it goes by until there is no replica again
    while len(times) < MOST and (time.perf_counter() < over or len(times) < LEAST):
        wait_until(lambda: not there_are(), "the deployment is at zero")
        time.sleep(0.2)  # for those who have just ended it
        began = time.perf_counter()
        assert handle.call(1) == 1
        times.append(time.perf_counter() - began)
    return times


def there_are() -> bool:
    """Replicas, in whatever state."""
    return bool(serve.status().applications["default"].deployments["NoOp"].replicas)

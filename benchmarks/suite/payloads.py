"""Values of some size, there and back: bytes, and arrays of float64. The largest beside SET and GET of the same bytes."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import redis

from benchmarks.peers.measure import callers_rate, run, say
from benchmarks.suite.how import How
from benchmarks.suite.served import NoOp
from millstream import serve
from millstream.handles import engines

SIZES = {"100 B": (100, 16), "10 kB": (10_000, 16), "1 MB": (1_000_000, 4)}  # bytes, and callers
LARGE = 50_000_000
LEAST = 3


def kinds() -> dict[str, Callable[[int], Any]]:
    """What makes a value of so many bytes."""
    found: dict[str, Callable[[int], Any]] = {"bytes": bytes}
    try:
        import numpy
    except ImportError:
        print("numpy is not installed: no arrays", file=sys.stderr)
    else:
        found["array"] = lambda size: numpy.arange(size // 8, dtype=numpy.float64)
    return found


def measure(how: How) -> None:
    serve.run(NoOp.bind())
    run(small(how))
    large(how)


async def small(how: How) -> None:
    handle = serve.get_deployment_handle("NoOp")
    for kind, make in kinds().items():
        for name, (size, callers) in SIZES.items():
            value = make(size)

            async def echo(x: int, value: Any = value) -> int:
                assert len(await handle.call(value)) == len(value)
                return x

            await echo(1)
            say(**{f"{kind}, {name}": await callers_rate(echo, 1, callers, how.seconds / 2)})


def large(how: How) -> None:
    """In turn, so that a slow moment of the machine hits all."""
    handle = serve.get_deployment_handle("NoOp", sync=True)
    values = {kind: make(LARGE) for kind, make in kinds().items()}
    times: dict[str, list[float]] = {name: [] for name in (*values, "bare")}
    with redis.Redis.from_url(engines.settings().url, socket_timeout=30) as client:

        def there_and_back(value: bytes) -> Any:
            client.set("bare", value)
            return client.get("bare")

        over = time.perf_counter() + len(times) * how.seconds
        while time.perf_counter() < over or len(times["bare"]) < LEAST:
            for kind, value in values.items():
                times[kind].append(_took_s(handle.call, value))
            times["bare"].append(_took_s(there_and_back, values["bytes"]))
        client.delete("bare")
    medians = {name: statistics.median(each) for name, each in times.items()}
    say(**{f"{name}, 50 MB": median for name, median in medians.items()})
    say(**{f"{kind}, 50 MB, times bare": medians[kind] / medians["bare"] for kind in values})


def _took_s(do: Callable[[Any], Any], value: Any) -> float:
    began = time.perf_counter()
    assert len(do(value)) == len(value)
    return time.perf_counter() - began

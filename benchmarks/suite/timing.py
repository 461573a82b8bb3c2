"""What workloads measure alike. The clocks are those of the comparison with other queues."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.peers.measure import PATIENCE_S, calibrate, calibrate_blocking, quantiles, say
from benchmarks.suite.how import How
from benchmarks.suite.parties import Meter

LIMIT_S = 2 * PATIENCE_S


async def rate(do: Callable[[range], Awaitable[Any]], seconds: float) -> float:
    """So many values per second."""
    count = await calibrate(do, seconds)
    began = time.perf_counter()
    await asyncio.wait_for(do(range(count)), LIMIT_S)
    return count / (time.perf_counter() - began)


async def say_rate(name: str, do: Callable[[range], Awaitable[Any]], how: How, **pids: list[int]) -> None:
    """So many values per second, and the CPU time of each in µs, by party."""
    count = await calibrate(do, how.seconds)
    meter, began = Meter(client=[os.getpid()], **pids), time.perf_counter()
    await asyncio.wait_for(do(range(count)), LIMIT_S)
    _say_rate(name, count, time.perf_counter() - began, meter)


def say_rate_blocking(name: str, do: Callable[[range], Any], how: How, **pids: list[int]) -> None:
    count = calibrate_blocking(do, how.seconds)
    meter, began = Meter(client=[os.getpid()], **pids), time.perf_counter()
    do(range(count))
    _say_rate(name, count, time.perf_counter() - began, meter)


def _say_rate(name: str, count: int, took_s: float, meter: Meter) -> None:
    say(**{name: count / took_s}, **{f"{name}, {party}": used / count for party, used in meter.used_us().items()})


def say_times(name: str, times_s: list[float]) -> None:
    p50, p99 = quantiles(times_s)
    say(**{f"{name}, p50": p50, f"{name}, p99": p99})

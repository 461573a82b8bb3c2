"""What one system's client is made to do, and the clocks around it. Needs nothing but Python: every peer imports it.

A peer is an object with `all` (submit values, return what comes of them), `call` (one value, its result) and, if it has
something to wait in for a worker, `submit` (values, results unwanted). Its methods are coroutines, or block. Each figure
is printed as soon as it is known, as a line of JSON; a workload that fails is left out, and says so on standard error.
"""

import asyncio
import json
import os
import resource
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from benchmarks.processes import cpu_us, descendants, send_signal

URL = os.environ.get("PEERS_URL", "redis://127.0.0.1")
SECONDS = float(os.environ.get("PEERS_SECONDS", "1"))  # what one workload is to take
PATIENCE_S = 30.0
CALLERS = 64
LEAST, MOST = 16, 200_000
SHARE = 0.2  # of SECONDS: what a first try must take to tell how many to choose
SIZES = {"100 B": (100, 16), "10 kB": (10_000, 16), "1 MB": (1_000_000, 4)}  # bytes, and callers


def say(**figures: float) -> None:
    print(json.dumps(figures), flush=True)


def choose(count: int, took_s: float, seconds: float) -> int:
    """How many take so many seconds, if `count` took `took_s`."""
    return max(LEAST, min(MOST, round(count / max(took_s, 1e-9) * seconds)))


def quantiles(times_s: list[float]) -> tuple[float, float]:
    """p50 and p99, in ms."""
    return statistics.median(times_s) * 1e3, statistics.quantiles(times_s, n=100, method="inclusive")[98] * 1e3


def workers() -> list[int]:
    """Whoever started them: the runner, or this client."""
    pid = int(os.environ.get("PEERS_WORKER_PID", "0"))
    return [pid, *descendants(pid)] if pid else descendants(os.getpid())


class Meter:
    """CPU time of client, worker processes together, and server, since it was made."""

    def __init__(self) -> None:
        self._then = self._read()

    @staticmethod
    def _read() -> dict[str, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        server = int(os.environ.get("PEERS_SERVER_PID", "0"))
        return {
            "client": (usage.ru_utime + usage.ru_stime) * 1e6,
            "worker": sum(map(cpu_us, workers())),
            **({"server": cpu_us(server)} if server else {}),
        }

    def per_request(self, count: int) -> dict[str, float]:
        return {f"{party}_us": (now - self._then[party]) / count for party, now in self._read().items()}


@contextmanager
def reported(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        print(f"{what} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)


@contextmanager
def frozen_workers() -> Iterator[None]:
    """Nobody takes what is submitted. They stay so: this is the last that is measured."""
    for pid in workers():
        send_signal(pid, signal.SIGSTOP)
    yield


# with coroutines


async def at_once(do: Callable[[Any], Awaitable[Any]], items: Iterable[Any]) -> list[Any]:
    """What comes of each item, with as many under way as there are callers: more would open a connection each."""
    items = list(items)
    results: list[Any] = [None] * len(items)
    numbers = iter(range(len(items)))

    async def one() -> None:
        for number in numbers:
            results[number] = await do(items[number])

    await asyncio.gather(*[one() for _ in range(CALLERS)])
    return results


async def measure(peer: Any) -> None:
    """Everything, with a peer of coroutines."""
    with reported("end to end"):
        count = await calibrate(peer.all)
        meter, began = Meter(), time.perf_counter()
        assert list(await asyncio.wait_for(peer.all(range(count)), PATIENCE_S)) == list(range(count))
        say(end_to_end=count / (time.perf_counter() - began), **meter.per_request(count))
    with reported("callers"):
        say(callers=await callers_rate(peer.call, 1, CALLERS, SECONDS))
    with reported("serial"):
        p50, p99 = quantiles(await serial_times(peer.call))
        say(async_p50_ms=p50, async_p99_ms=p99)
    for name, (size, callers) in SIZES.items():
        with reported(name):
            say(**{name: await callers_rate(peer.call, "x" * size, callers, SECONDS / 2)})
    if hasattr(peer, "submit"):
        with reported("submit"), frozen_workers():
            count = await calibrate(peer.submit)
            began = time.perf_counter()
            await asyncio.wait_for(peer.submit(range(count)), PATIENCE_S)
            say(submit=count / (time.perf_counter() - began))


async def calibrate(do: Callable[[range], Awaitable[Any]], seconds: float = SECONDS) -> int:
    """How many values keep `do` busy for so many seconds."""
    count = LEAST
    while True:
        began = time.perf_counter()
        await asyncio.wait_for(do(range(count)), PATIENCE_S)
        took_s = time.perf_counter() - began
        if took_s >= seconds * SHARE or count >= MOST:
            return choose(count, took_s, seconds)
        count *= 4


async def callers_rate(call: Callable[[Any], Awaitable[Any]], value: Any, callers: int, seconds: float) -> float:
    """Results per second of so many callers, each waiting for its result before its next call."""
    done, began = 0, time.perf_counter()

    async def one() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            assert await call(value) == value
            done += 1

    await asyncio.wait_for(asyncio.gather(*[one() for _ in range(callers)]), PATIENCE_S)
    return done / (time.perf_counter() - began)


async def serial_times(call: Callable[[Any], Awaitable[Any]], seconds: float = SECONDS) -> list[float]:
    """What each of one call after the other takes, in s."""
    times: list[float] = []
    over = time.perf_counter() + seconds
    while (began := time.perf_counter()) < over or len(times) < LEAST:
        assert await call(1) == 1
        times.append(time.perf_counter() - began)
    return times


# with methods that block


def measure_blocking(peer: Any) -> None:
    """Everything, with a peer whose methods block."""
    with reported("end to end"):
        count = calibrate_blocking(peer.all)
        meter, began = Meter(), time.perf_counter()
        assert list(peer.all(range(count))) == list(range(count))
        say(end_to_end=count / (time.perf_counter() - began), **meter.per_request(count))
    with reported("callers"):
        say(callers=callers_rate_blocking(peer.call, 1, CALLERS, SECONDS))
    measure_serial_blocking(peer.call)
    for name, (size, callers) in SIZES.items():
        with reported(name):
            say(**{name: callers_rate_blocking(peer.call, "x" * size, callers, SECONDS / 2)})
    if hasattr(peer, "submit"):
        with reported("submit"), frozen_workers():
            count = calibrate_blocking(peer.submit)
            began = time.perf_counter()
            peer.submit(range(count))
            say(submit=count / (time.perf_counter() - began))


def measure_serial_blocking(call: Callable[[Any], Any]) -> None:
    with reported("serial"):
        assert call(1) == 1
        p50, p99 = quantiles(serial_times_blocking(call))
        say(sync_p50_ms=p50, sync_p99_ms=p99)


def serial_times_blocking(call: Callable[[Any], Any], seconds: float = SECONDS) -> list[float]:
    """What each of one call after the other takes, in s."""
    times: list[float] = []
    over = time.perf_counter() + seconds
    while (began := time.perf_counter()) < over or len(times) < LEAST:
        assert call(1) == 1
        times.append(time.perf_counter() - began)
    return times


def calibrate_blocking(do: Callable[[range], Any], seconds: float = SECONDS) -> int:
    """How many values keep `do` busy for so many seconds."""
    count = LEAST
    while True:
        began = time.perf_counter()
        do(range(count))
        took_s = time.perf_counter() - began
        if took_s >= seconds * SHARE or count >= MOST:
            return choose(count, took_s, seconds)
        count *= 4


def callers_rate_blocking(call: Callable[[Any], Any], value: Any, callers: int, seconds: float) -> float:
    began = time.perf_counter()

    def one(_: int) -> int:
        done = 0
        while time.perf_counter() < began + seconds:
            assert call(value) == value
            done += 1
        return done

    with ThreadPoolExecutor(callers) as threads:
        done = sum(threads.map(one, range(callers)))
    return done / (time.perf_counter() - began)


def run(main: Coroutine[Any, Any, None]) -> None:
    """On uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)

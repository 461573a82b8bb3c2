"""A short benchmark: one client, one replica, a no-op async method, results collected, through the public API.

    python -m benchmarks.end_to_end [--requests 20000] [--rounds 5] [--aof]      (`make bench` measures much more)

Everything runs on this machine, server included. Prints requests/s of `map` and of 64 concurrent callers, the serial
round trip of the async and the sync handle, and the CPU time per request of client, replica and server, which is
steadier than wall time on a shared machine. Figures are medians over the rounds, with minimum and maximum.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from millstream import serve
from millstream.broker.registry import Registry
from millstream.handles import engines
from millstream.runtime import ensure_running, with_registry


@serve.deployment
class NoOp:
    async def __call__(self, x: int) -> int:
        return x


def client_cpu_us() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_utime + usage.ru_stime) * 1e6


def replica_cpu_us() -> float:
    """User and system time of the one replica, from /proc."""
    (replica,) = serve.status().applications["default"].deployments["NoOp"].replicas
    fields = Path(f"/proc/{replica.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") * 1e6


def server_cpu_us() -> float:
    async def read(registry: Registry) -> float:
        info = await registry.client.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"]) * 1e6

    return with_registry(read)


def cpu_us() -> tuple[float, float, float]:
    return client_cpu_us(), replica_cpu_us(), server_cpu_us()


async def measure(count: int) -> dict[str, float]:
    handle = serve.get_deployment_handle("NoOp")
    assert [value async for value in handle.map(range(500))] == list(range(500))
    figures: dict[str, float] = {}

    before, t = cpu_us(), time.perf_counter()
    values = [value async for value in handle.map(range(count))]
    figures["map, requests/s"] = count / (time.perf_counter() - t)
    assert values == list(range(count))
    for name, used, then in zip(("client", "replica", "server"), cpu_us(), before, strict=True):
        figures[f"  {name}, CPU us/request"] = (used - then) / count

    async def caller() -> None:
        for x in range(count // 64):
            assert await handle.call(x) == x

    t = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(64)])
    figures["64 callers, requests/s"] = count / (time.perf_counter() - t)

    times = []
    for x in range(2000):
        t = time.perf_counter()
        await handle.call(x)
        times.append((time.perf_counter() - t) * 1e3)
    figures["async serial p50, ms"] = statistics.median(times)
    figures["async serial p99, ms"] = statistics.quantiles(times, n=100)[98]

    times = []
    for x in range(1000):
        t = time.perf_counter()
        await (await handle.remote(x))
        times.append((time.perf_counter() - t) * 1e3)
    figures["remote then ref, p50, ms"] = statistics.median(times)
    return figures


def measure_sync(count: int) -> dict[str, float]:
    handle = serve.get_deployment_handle("NoOp", sync=True)
    t = time.perf_counter()
    assert list(handle.map(range(count))) == list(range(count))
    figures = {"sync map, requests/s": count / (time.perf_counter() - t)}
    times = []
    for x in range(1000):
        t = time.perf_counter()
        handle.call(x)
        times.append((time.perf_counter() - t) * 1e3)
    figures["sync serial p50, ms"] = statistics.median(times)
    return figures


def environment() -> dict[str, str]:
    async def read(registry: Registry) -> str:
        info = await registry.client.info("server")
        return f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}"

    return {
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "machine": platform.machine(),
        "server": with_registry(read),
    }


def report(rows: list[dict[str, float]], about: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"environment": about, "rounds": rows}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'':28} {'median':>12} {'min':>12} {'max':>12}")
    for name in rows[0]:
        values = sorted(row[name] for row in rows)
        median = statistics.median(values)
        places = 0 if median > 1000 else 2 if median < 100 else 1
        print(f"{name:28} {median:12,.{places}f} {values[0]:12,.{places}f} {values[-1]:12,.{places}f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--aof", action="store_true", help="a durable server (AOF everysec), as `millstream run` has it"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import uvloop

    with tempfile.TemporaryDirectory() as state:
        if options.aof:
            ensure_running(Path(state) / "state")
        serve.run(NoOp.bind())
        rows: list[dict[str, Any]] = []
        for number in range(options.rounds):
            rows.append({**uvloop.run(measure(options.requests)), **measure_sync(options.requests)})
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
        report(rows, {**environment(), "AOF": "everysec" if options.aof else "off"}, options.json)
        assert engines.is_initialized()
        serve.shutdown()


if __name__ == "__main__":
    main()

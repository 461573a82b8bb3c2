"""The soak: a million requests of all kinds through one client and one replica, and what memory and keys do meanwhile.

    make soak      (python -m benchmarks.soak [--requests 1000000] [--json FILE] [--plot docs/figures/soak.svg])

Prints and plots the resident memory of client and replica, the memory that the server uses for data, and its number of
keys. Fails if one of them grows: the median of the last fifth may be above that of the second by 3 MB (client, replica),
2 MB (server) or 2,000 keys at most.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import environment
from millstream import serve
from millstream.broker.connection import open_control
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle

ROUND = 10_000  # requests between two samples
ALLOWED = {"client_mb": 3.0, "replica_mb": 3.0, "server_mb": 2.0, "keys": 2000.0}


@serve.deployment(result_ttl_s=10)  # of results whose ref was passed on; nobody but the clock can free them
class Work:
    async def __call__(self, x: int) -> int:
        return x

    def sync(self, x: int) -> int:
        return x

    async def fail(self, x: int) -> int:
        raise ValueError(x)

    async def count(self, to: int) -> AsyncIterator[int]:
        for x in range(to):
            yield x


@dataclass(frozen=True, slots=True)
class Sample:
    """After so many requests."""

    requests: int
    at_s: float
    client_mb: float
    replica_mb: float
    server_mb: float
    keys: int


async def one_round(handle: DeploymentHandle) -> int:
    """About ROUND requests, most of them plain; how many it were."""
    plain = ROUND * 8 // 10
    assert sum([x async for x in handle.map(range(plain))]) == sum(range(plain))
    for _ in range(ROUND // 100):  # refs: awaited, chained, dropped without a look
        ref = await handle.remote(1)
        assert await ref == 1
        assert await handle.call(handle.remote(2)) == 2
        await handle.options(block_until="queued").remote(3)
    failures = [e async for e in handle.fail.map(range(ROUND // 50), return_exceptions=True)]
    assert all(isinstance(e, ValueError) for e in failures)
    assert [x async for x in handle.sync.map(range(ROUND // 20))] == list(range(ROUND // 20))
    streams = ROUND // 1000
    for _ in range(streams):
        assert [x async for x in handle.count.stream(50)] == list(range(50))
    large = b"x" * 100_000
    for _ in range(5):
        assert await handle.call(large) == large
    return plain + 4 * (ROUND // 100) + ROUND // 50 + ROUND // 20 + streams + 5


def resident_mb(pid: int | str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def soak(count: int) -> list[Sample]:
    handle = serve.get_deployment_handle("Work")
    (replica,) = (await _status()).applications["default"].deployments["Work"].replicas
    samples, done, started = list[Sample](), 0, time.monotonic()
    async with open_control(engines.settings(), "soak") as client:
        redis: Any = client
        while done < count:
            done += await one_round(handle)
            memory, keys = await redis.info("memory"), await redis.dbsize()
            sample = Sample(
                done, time.monotonic() - started, resident_mb("self"), resident_mb(replica.pid),
                memory["used_memory"] / 2**20, keys,
            )  # fmt: skip
            samples.append(sample)
            if len(samples) % 10 == 0:
                print(_line(sample), file=sys.stderr)
    return samples


async def _status() -> serve.ServeStatus:
    import asyncio

    return await asyncio.to_thread(serve.status)


def _line(sample: Sample) -> str:
    return (
        f"{sample.requests:>10,} requests {sample.at_s:6.0f} s   client {sample.client_mb:6.1f} MB   "
        f"replica {sample.replica_mb:6.1f} MB   server {sample.server_mb:6.1f} MB   {sample.keys:,} keys"
    )


def growth(samples: list[Sample]) -> dict[str, float]:
    """What grew by how much, from the second fifth to the last: the first warms up."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth] or samples[:1], samples[-fifth:]
    return {
        name: statistics.median(getattr(s, name) for s in late) - statistics.median(getattr(s, name) for s in early)
        for name in ALLOWED
    }


def plot(samples: list[Sample], title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "millstream"  # the same file for the same data
    from matplotlib import pyplot

    figure, (memory, keys) = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=[2, 1])
    millions = [s.requests / 1e6 for s in samples]
    for name, label in (("client_mb", "client, RSS"), ("replica_mb", "replica, RSS"), ("server_mb", "server, data")):
        memory.plot(millions, [getattr(s, name) for s in samples], label=label)
    memory.set_ylabel("MB")
    memory.set_ylim(bottom=0)
    memory.legend(loc="center right", frameon=False)
    memory.set_title(title, fontsize=9)
    keys.plot(millions, [s.keys for s in samples], color="gray")
    keys.set_ylabel("keys on the server")
    keys.set_ylim(bottom=0)
    keys.set_xlabel("million requests")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    import uvloop

    serve.run(Work.bind())
    try:
        samples = uvloop.run(soak(options.requests))
        about = ", ".join(f"{name} {value}" for name, value in environment().items())
    finally:
        serve.shutdown()
    grown = growth(samples)
    print(_line(samples[-1]))
    print("grew by " + ", ".join(f"{name} {value:+.1f}" for name, value in grown.items()))
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "samples": [asdict(s) for s in samples]}, indent=1))
    if options.plot:
        plot(
            samples, f"{samples[-1].requests:,} requests of all kinds, one client, one replica ({about})", options.plot
        )
    if too_much := [name for name, value in grown.items() if value > ALLOWED[name]]:
        sys.exit(f"not flat: {', '.join(too_much)}")


if __name__ == "__main__":
    main()

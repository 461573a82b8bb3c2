"""The floor beside us: its own server and worker, and its client made to do the same. See benchmarks/floor."""

import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.floor.client import Client
from tests.servers import Server

WINDOW = 1_000  # as `map` has it


@dataclass(frozen=True, slots=True)
class Floor:
    port: int
    worker_pid: int
    server_pid: int

    async def connect(self) -> Client:
        client = Client()
        await client.start(self.port)
        assert await client.call(1) == 1
        return client


@contextmanager
def floor(aof: bool) -> Iterator[Floor]:
    durability = ("--appendonly", "yes", "--appendfsync", "everysec") if aof else ()
    server = Server("valkey", *durability).start()
    try:
        worker = subprocess.Popen([sys.executable, "-m", "benchmarks.floor.worker", str(server.port)])
        try:
            yield Floor(server.port, worker.pid, server.pid)
        finally:
            worker.kill()
            worker.wait()
    finally:
        server.stop()


async def all_within(client: Client, values: Iterable[Any], window: int = WINDOW) -> list[Any]:
    """As `client.all`, with at most so many under way."""
    results, under_way = [], deque[Any]()
    for value in values:
        if len(under_way) >= window:
            results.append(await under_way.popleft())
        under_way.append(client.call(value))
    return results + [await future for future in under_way]
